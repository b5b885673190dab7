"""profile(): measure the kernels a table lacks, in batches, each written down before the next begins.

Kernels of like cost share a batch, so that small ones get many runs. A batch whose reference kernel was slow (another
process on the machine) is repeated; a batch that fails is halved until the kernel at fault is alone, and that one gets
a row saying so. Several devices share the batches.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeprune.device.device import AgentStartError, Device, DeviceLostError
from edgeprune.device.pool import share
from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.measure import KernelsFailedError, measure_batch, measure_memory, measure_overhead
from edgeprune.latency.micro import weight_bytes
from edgeprune.latency.table import LatencyTable, Measurement, now

BATCH_KERNELS = 32
BATCH_BYTES = 96 << 20
MACS_PER_MS = 6e7  # only for the size of batches
BYTES_PER_MS = 8e6
SMALL_BATCH_MS = 0.1  # kernels below this, on average, are small


@dataclass(slots=True)
class SweepStats:
    """Counts of one sweep; ``known`` kernels were in the table already."""

    known: int = 0
    measured: int = 0
    failed: int = 0
    batches: int = 0
    repeated: int = 0

    def add(self, other: SweepStats) -> None:
        self.known += other.known
        self.measured += other.measured
        self.failed += other.failed
        self.batches += other.batches
        self.repeated += other.repeated


Progress = Callable[[int, int], None]  # (kernels done, kernels to do)


def profile(
    device: Device, table: LatencyTable, kernels: Sequence[Kernel], progress: Progress | None = None
) -> SweepStats:
    """Measure the kernels that have no row yet; after a crash the same call goes on where it was.

    Raises TableError when the table belongs to another device, DeviceLostError when the device fails again and again.
    """
    if table.fingerprint != device.fingerprint:
        raise TableError(f"{table.path} belongs to another device or runtime version; open that device's own table")
    table.reload()
    unique = {kernel.key(): kernel for kernel in kernels}
    missing = table.missing(list(unique.values()))
    stats = SweepStats(known=len(unique) - len(missing))
    if missing:
        table.append([measure_overhead(device)])
        if not table.memory:
            table.append(measure_memory(device))
    sweeps: dict[int, _Sweep] = {}
    done, lock = 0, threading.Lock()

    def work(worker: Device, batch: list[Kernel]) -> None:
        nonlocal done
        sweep = sweeps.setdefault(id(worker), _Sweep(worker, table))
        fresh = table.missing(batch)  # another process may have measured it meanwhile
        if fresh:
            sweep.measure(fresh)
        with lock:
            done += len(batch)
            if progress is not None:
                progress(done, len(missing))

    share(device, batches(missing, device.target.protocol.batch_ms), work)
    for sweep in sweeps.values():
        stats.add(sweep.stats)
    return stats


def expected_ms(kernel: Kernel) -> float:
    """A rough guess, for batching and time limits only."""
    elements = sum(math.prod(shape) for shape in kernel.inputs) + math.prod(kernel.output)
    per_output = weight_bytes(kernel) / 4 / max(1, kernel.output[1] if len(kernel.output) > 1 else 1)
    return per_output * math.prod(kernel.output) / MACS_PER_MS + 4 * elements / BYTES_PER_MS + 0.01


def batches(kernels: Sequence[Kernel], batch_ms: float) -> list[list[Kernel]]:
    """Kernels of like cost together, at most ``batch_ms`` a run by the guess."""
    result: list[list[Kernel]] = []
    spent = size = math.inf
    for kernel in sorted(kernels, key=lambda k: (expected_ms(k), k)):
        cost, weight = expected_ms(kernel), weight_bytes(kernel)
        if spent + cost > batch_ms or size + weight > BATCH_BYTES or len(result[-1]) >= BATCH_KERNELS:
            result.append([])
            spent, size = 0.0, 0.0
        result[-1].append(kernel)
        spent += cost
        size += weight
    return result


class _Sweep:
    """What one device does of a sweep; how quiet it can be is its own."""

    def __init__(self, device: Device, table: LatencyTable):
        self.device = device
        self.table = table
        self.stats = SweepStats()
        self.best = (math.inf, math.inf)  # references, large and small
        self.lost = 0

    def measure(self, batch: list[Kernel], again: bool = True) -> None:
        """``again``: a lone kernel on which the device was lost gets a second chance, since its row would stay."""
        try:
            rows = self.steady(batch)
        except (KernelsFailedError, DeviceLostError, TableError) as error:
            lost = isinstance(error, DeviceLostError)
            self.lost += lost
            if self.lost > 20 or isinstance(error, AgentStartError):
                raise
            if len(batch) > 1:
                half = len(batch) // 2
                self.measure(batch[:half])
                self.measure(batch[half:])
                return
            if lost and again:
                self.measure(batch, again=False)
                return
            if lost:
                measure_batch(self.device, [])  # raises when it is the device, and then no kernel is blamed
            rows = [Measurement(batch[0].key(), error=str(error), time=now())]
            self.stats.failed += 1
        else:
            self.stats.measured += len(rows)
        self.table.append(rows)

    def steady(self, batch: list[Kernel]) -> list[Measurement]:
        """The batch's rows from the attempt whose references were fastest. Above the drift limit it is measured again:
        by the large reference, or by the small one where small kernels are at stake."""
        protocol = self.device.target.protocol
        cost = sum(expected_ms(kernel) for kernel in batch)
        kept: list[Measurement] = []
        for attempt in range(1 + protocol.repeats):
            rows = measure_batch(self.device, batch, cost)
            self.stats.batches += 1
            self.stats.repeated += attempt > 0
            if not kept or self.slowness(rows) < self.slowness(kept):
                kept = rows
            found = _references(kept)
            self.best = min(self.best[0], found[0]), min(self.best[1], found[1])
            limits = [best * (1 + protocol.drift) for best in self.best]
            if found[0] <= limits[0] and (found[1] <= limits[1] or cost > SMALL_BATCH_MS * len(batch)):
                break
        return kept

    def slowness(self, rows: Sequence[Measurement]) -> float:
        large, small = _references(rows)
        return large / self.best[0] + small / self.best[1]


def _references(rows: Sequence[Measurement]) -> tuple[float, float]:
    return rows[0].hot_ref_ms, rows[0].small_ref_ms
