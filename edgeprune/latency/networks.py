"""Whole networks timed side by side: interleaved rounds, ratios, medians with their confidence.

On a shared machine absolute times drift by tens of percent within minutes while ratios of interleaved medians hold to
one. So every set is timed together with a fixed reference network, a chain of the reference kernel, which also makes a
whole network's time comparable with rows of the latency table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgeprune.device.device import Device, Job
from edgeprune.errors import DeviceError
from edgeprune.latency.measure import REFERENCE
from edgeprune.latency.micro import Micro, build_chain
from edgeprune.latency.table import LatencyTable

REFERENCE_CONVS = 8
REFERENCE_NAME = "(reference)"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of times with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        return (self.high - self.low) / 2 / self.value


@dataclass(frozen=True, slots=True)
class NetworkTiming:
    """One network's samples in milliseconds. ``low_ms``..``high_ms`` is the 95 % confidence interval of the median;
    ``interrupted`` the share of samples in which the scheduler took the processor away; ``reference`` its ratio to the
    reference network."""

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float
    samples: int
    interrupted: float
    reference: Ratio

    def normal_ms(self, table: LatencyTable) -> float:
        """The time on the quiet device the table's rows are told for."""
        return self.reference.value * REFERENCE_CONVS * table.reference_ms


@dataclass(frozen=True, slots=True)
class Timings:
    """``networks`` by name; ``rounds[name]`` holds the median of each round, (rounds,) ms, for ratios."""

    networks: Mapping[str, NetworkTiming]
    rounds: Mapping[str, np.ndarray]

    def ratio(self, name: str, base: str) -> Ratio:
        """Time of ``name`` over time of ``base``, from the rounds' own ratios."""
        return _ratio(self.rounds[name], self.rounds[base])


def measure_networks(
    device: Device, models: Mapping[str, bytes], rounds: int | None = None, seed: int = 0, limit_s: float = 60.0
) -> Timings:
    """Time serialised ONNX models against each other. ``limit_s`` bounds the rounds after the fifth.

    Raises DeviceError when the runtime refuses one of them or the device does not answer.
    """
    protocol = device.target.protocol
    rounds = protocol.rounds if rounds is None else rounds
    reference = _reference_network()
    names = [REFERENCE_NAME, *models]
    fields = {
        "weights": [reference.weights, *([] for _ in models)],
        "warmup_ms": protocol.warmup_ms,
        "rounds": rounds,
        "round_ms": protocol.round_ms,
        "seed": seed,
        "limit_s": limit_s,
    }
    bytes_sent = sum(len(model) for model in models.values())
    timeout_s = 60 + 3 * limit_s + 30 * len(models) + bytes_sent / 2e7
    result = device.run(Job("networks", fields, [reference.model, *models.values()], timeout_s=timeout_s))
    if not result.ok:
        raise DeviceError(f"target {device.target.name} cannot run the networks: {result.error}")
    flat = np.frombuffer(result.blobs[0], np.float64).reshape(-1, 2)
    samples: dict[str, np.ndarray] = {}
    medians: dict[str, np.ndarray] = {}
    at = 0
    for name, counts in zip(names, result.fields["samples"], strict=True):
        parts = []
        for count in counts:
            parts.append(flat[at : at + count])
            at += count
        samples[name] = np.concatenate(parts)
        medians[name] = np.array([np.median(_good(part)) for part in parts]) * 1e3
    timings = {name: _timing(name, samples[name], medians) for name in names[1:]}
    return Timings(timings, medians)


def _good(samples: np.ndarray) -> np.ndarray:
    """Times of the samples that were not interrupted; of all (told in processor time) when there is none."""
    undisturbed = samples[samples[:, 1] == 0, 0]
    return undisturbed if len(undisturbed) else samples[:, 0]


def _timing(name: str, samples: np.ndarray, medians: Mapping[str, np.ndarray]) -> NetworkTiming:
    times = _good(samples) * 1e3
    middle = float(np.median(times))
    half = _half_width(times)
    return NetworkTiming(
        name=name,
        median_ms=middle,
        low_ms=middle - half,
        high_ms=middle + half,
        p90_ms=float(np.quantile(times, 0.9)),
        samples=len(times),
        interrupted=float(np.mean(samples[:, 1] != 0)),
        reference=_ratio(medians[name], medians[REFERENCE_NAME]),
    )


def _half_width(values: np.ndarray) -> float:
    """Half the 95 % confidence interval of the median, from the interquartile range (McGill, Tukey, Larsen 1978)."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(1.57 * (high - low) / math.sqrt(len(values)))


def _ratio(times: np.ndarray, base: np.ndarray) -> Ratio:
    ratios = times / base
    middle, half = float(np.median(ratios)), _half_width(ratios)
    return Ratio(middle, middle - half, middle + half)


@functools.cache
def _reference_network() -> Micro:
    return build_chain([REFERENCE] * REFERENCE_CONVS)
