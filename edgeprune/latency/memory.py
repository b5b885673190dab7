"""Weights from main memory: how much slower a kernel is when the caches do not hold its weights.

Kernels are measured hot and cold. A network whose weights and activations fit into the last cache runs hot, a larger
one cold; between lies a ramp over the *working set*, what one run touches in all. The ends of the ramp, and what a
megabyte from main memory costs, are measured once per table with copies of one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgeprune.latency.kernel import Kernel
from edgeprune.latency.micro import weight_bytes
from edgeprune.latency.table import LatencyTable


@dataclass(frozen=True, slots=True)
class Footprint:
    """Megabytes of a network: its weights, and the most activations that one kernel touches."""

    weights_mb: float
    activations_mb: float

    @property
    def working_mb(self) -> float:
        return self.weights_mb + self.activations_mb


@dataclass(frozen=True, slots=True)
class Memory:
    """``cold_ms_per_mb`` above a working set of ``full_mb``, nothing below ``start_mb``, linear between."""

    cold_ms_per_mb: float = 0.0
    start_mb: float = 4.0
    full_mb: float = 20.0

    def share(self, size: Footprint) -> float:
        """How cold a network of this size runs: 0 in the caches, 1 from main memory."""
        return min(1.0, max(0.0, (size.working_mb - self.start_mb) / (self.full_mb - self.start_mb)))

    def touch_ms(self, size: Footprint) -> float:
        """The first touch of every activation buffer in a run."""
        return self.cold_ms_per_mb * self.share(size) * size.activations_mb


def fit_memory(table: LatencyTable) -> Memory:
    """The ramp that a table's memory rows show; none without rows."""
    rows = list(table.memory.values())
    if not rows:
        return Memory()
    working = np.array([row.working_mb for row in rows])
    times = np.array([row.raw_ms / row.ref_ms for row in rows]) * table.reference_ms
    weights = rows[0].weights_mb
    hot = float(np.median(times[working <= working.min() + 0.1]))
    cold = float(np.median(times[working >= working.max() - 0.1]))
    height = cold - hot
    if height <= 0:
        return Memory()
    best, best_loss = Memory(height / weights), np.inf
    for start in (2.0, 3.0, 4.0, 6.0, 8.0):
        for full in (8.0, 10.0, 12.0, 16.0, 20.0, 24.0):
            if full <= start:
                continue
            candidate = Memory(height / weights, start, full)
            told = hot + height * np.array([candidate.share(Footprint(w, 0.0)) for w in working])
            loss = float(np.sum(np.abs(told - times)))
            if loss < best_loss:
                best, best_loss = candidate, loss
    return best


def footprint(kernels: Iterable[Kernel]) -> Footprint:
    """Of a network given as its kernels."""
    weights = activations = 0.0
    for kernel in kernels:
        weights += weight_bytes(kernel) / 1e6
        activations = max(activations, sum(4e-6 * math.prod(shape) for shape in (*kernel.inputs, kernel.output)))
    return Footprint(weights, activations)
