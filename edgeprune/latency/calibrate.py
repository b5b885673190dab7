"""From whole networks that were measured to the correction of a sum of kernels.

    network = scale * sum + per_kernel * kernels + constant      (all non-negative)

Fitted to relative errors by reweighted least squares (Huber weights), with a weak pull towards the plain sum so that a
single network already gives a sensible scale. What the plain sum misses: the share of the profiler's cost that was
taken off too much or too little per node, caches warmer or colder than in a micro model, and the call itself.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.device.device import Device
from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.memory import fit_memory, footprint
from edgeprune.latency.networks import REFERENCE_CONVS, Timings, measure_networks
from edgeprune.latency.table import LatencyTable, NetworkRow, now

HUBER = 0.02  # relative errors beyond this count linearly
PULL = 0.05  # weight of the plain sum against one measured network


@dataclass(frozen=True, slots=True)
class Calibration:
    """``networks`` is how many measurements it rests on; none: the plain sum."""

    scale: float = 1.0
    per_kernel_ms: float = 0.0
    constant_ms: float = 0.0
    networks: int = 0

    def apply(self, sum_ms: float, kernels: int) -> float:
        return self.scale * sum_ms + self.per_kernel_ms * kernels + self.constant_ms


def build_of(kernels: Iterable[Kernel]) -> frozenset[tuple[object, ...]]:
    """What kind of network it is: its kernels without their channel counts. Networks cut from one another are of like
    build."""
    return frozenset((k.op, k.attrs, k.output[2:], k.tail) for k in kernels)


def fit(table: LatencyTable, like: frozenset[tuple[object, ...]] | None = None) -> Calibration:
    """The calibration that a table's whole networks give; rows whose kernels are not all measured are left out.

    Networks count by how much of their build they share with ``like`` (all the same without it), since what a sum
    misses depends on the kind of kernels.
    """
    memory = fit_memory(table)
    sums, counts, times, weights = [], [], [], []
    for row in table.networks.values():
        kernels = [Kernel.from_key(key) for key in row.keys]
        size = footprint(kernels)
        try:
            told = sum(table.ms(key, memory.share(size)) for key in row.keys)
        except TableError:
            continue
        sums.append(told + memory.touch_ms(size))
        counts.append(len(row.keys))
        times.append(row.ratio * REFERENCE_CONVS * table.reference_ms)
        build = build_of(kernels)
        weights.append(1.0 if like is None else max(0.01, len(build & like) / len(build | like)) ** 2)
    return fit_samples(np.array(sums), np.array(counts), np.array(times), np.array(weights))


def fit_samples(
    sums: np.ndarray, counts: np.ndarray, times: np.ndarray, importance: np.ndarray | None = None
) -> Calibration:
    """sums, counts, times: (networks,) plain sums in ms, kernels, measured ms. ``importance``: (networks,) weights."""
    if len(sums) == 0:
        return Calibration()
    unit = np.array([1.0, 1e-3, 1e-2])  # per kernel a microsecond, once ten: columns of like size for the pull
    design = np.stack([sums, counts, np.ones(len(sums))], axis=1) / times[:, None] * unit
    prior = np.array([1.0, 0.0, 0.0])
    pull = np.sqrt(PULL) * np.diag([1.0, 0.1, 0.1])
    given = np.ones(len(sums)) if importance is None else importance
    weights = given
    solution = prior
    for _ in range(30):
        root = np.sqrt(weights)
        rows = np.concatenate([design * root[:, None], pull])
        target = np.concatenate([root, pull @ prior])
        solution = _non_negative(rows, target)
        error = np.abs(design @ solution - 1)
        weights = given * np.minimum(1.0, HUBER / np.maximum(error, 1e-12))
    scale, per_kernel, constant = (float(v) for v in solution * unit)
    return Calibration(scale, per_kernel, constant, len(sums))


def _non_negative(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares over non-negative solutions; three unknowns, so every support is tried."""
    best, best_loss = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for support in itertools.combinations(range(rows.shape[1]), size):
            part = np.linalg.lstsq(rows[:, support], target, rcond=None)[0]
            if np.any(part < 0):
                continue
            solution = np.zeros(rows.shape[1])
            solution[list(support)] = part
            loss = float(np.sum((rows @ solution - target) ** 2))
            if loss < best_loss:
                best, best_loss = solution, loss
    return best


def record_networks(table: LatencyTable, timings: Timings, kernels: Mapping[str, Sequence[str]]) -> None:
    """Store measured networks for calibration; ``kernels``: network name -> the keys of its kernels, in order."""
    rows = []
    for name, keys in kernels.items():
        timing = timings.networks[name]
        reference = timing.reference
        rows.append(
            NetworkRow(network_key(keys), tuple(keys), reference.value, reference.spread, timing.samples, now())
        )
    table.append(rows)


def network_key(keys: Sequence[str]) -> str:
    """Names a network by its kernels: networks of equal kernels take equal time."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24]


def calibrate(
    device: Device, table: LatencyTable, models: Mapping[str, bytes], kernels: Mapping[str, Sequence[str]]
) -> Timings:
    """Measure whole networks and store them; kernels as in ``record_networks``."""
    timings = measure_networks(device, models)
    record_networks(table, timings, kernels)
    return timings
