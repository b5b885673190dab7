"""One batch of kernels on the device: build, run, and give each kernel the time of the nodes the runtime made of it.

The runtime's profiler counts whole microseconds and rounds down; half a microsecond a node is added back. A median of
whole numbers cannot resolve a kernel of few microseconds, so below 50 us the mean of the middle four fifths of the runs
is taken: robust against what disturbs a run, and averaging the rounding away. The profiler also costs 2 to 3 us a node,
which running the same model without it reveals.

Every kernel is measured hot, right after the same batch has run, and cold, with the caches emptied before each run;
where a network lies between is memory.py's business.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeprune.device.device import Device, Job
from edgeprune.errors import DeviceError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.micro import Micro, build, weight_bytes
from edgeprune.latency.table import Measurement, MemoryRow, OverheadRow, now

REFERENCE = Kernel(
    op="Conv",
    attrs=(
        ("dilations", "1x1"),
        ("group", "1"),
        ("kernel_shape", "3x3"),
        ("pads", "1x1x1x1"),
        ("strides", "1x1"),
    ),
    inputs=((1, 64, 28, 28),),
    output=(1, 64, 28, 28),
    tail=("Relu",),
)
SMALL_REFERENCE = replace(REFERENCE, inputs=((1, 16, 32, 32),), output=(1, 16, 32, 32))
SMALL_US = 50.0  # of a clock that counts microseconds
LEAST_RUNS = 12
OVERHEAD_KERNELS = 24
OVERHEAD_SHAPE = (1, 16, 16, 16)
MEMORY_SHAPE = (1, 256, 7, 7)
MB_PER_S = 50.0  # slowest link and session creation that is waited for
REORDERS = ("ReorderInput", "ReorderOutput")
_BRANCH = re.compile(r"([kpq])(\d+)_")


class KernelsFailedError(DeviceError):
    """The device refused a batch; one of its kernels is at fault."""


def measure_batch(device: Device, kernels: Sequence[Kernel], expected_ms: float = 3.0) -> list[Measurement]:
    """Measure kernels side by side with the reference kernel. ``expected_ms``: about what one run of all takes.

    Raises KernelsFailedError when the device answers that the batch failed, DeviceLostError when it does not answer,
    TableError for a kernel that cannot be rebuilt.
    """
    micro = build([REFERENCE, SMALL_REFERENCE, *kernels])
    hot, cold = _run(device, micro, (0.0, device.target.protocol.evict_mb), expected_ms)
    rows = []
    for index, kernel in enumerate(kernels, start=2):
        near, far = hot.summary(index, kernel), cold.summary(index, kernel)
        rows.append(
            Measurement(
                kernel.key(),
                hot_ms=near.ms,
                cold_ms=far.ms,
                nodes=near.nodes,
                hot_ref_ms=hot.summary(0, REFERENCE).ms,
                cold_ref_ms=cold.summary(0, REFERENCE).ms,
                small_ref_ms=hot.summary(1, SMALL_REFERENCE).ms,
                spread=max(near.spread, far.spread),
                n=near.n,
                time=now(),
            )
        )
    return rows


def measure_overhead(device: Device) -> OverheadRow:
    """What the profiler costs per node: many small kernels with and without it, taking turns.

    Raises DeviceError when the device cannot run them.
    """
    small = replace(REFERENCE, inputs=(OVERHEAD_SHAPE,), output=OVERHEAD_SHAPE)
    evict = (0.0, device.target.protocol.evict_mb)
    kinds = _run(device, build([REFERENCE, *[small] * OVERHEAD_KERNELS]), evict, repeat=2, compare=True)
    costs = []
    for kind in kinds:
        plain_us = float(np.median(_undisturbed(kind.whole, kind.whole[:, 1] != 0)[:, 0])) * 1e6
        told_us = sum(_trimmed_mean(column) + 0.5 for column in kind.runs.T)
        costs.append(max(0.0, told_us - plain_us) / len(kind.owners) / 1e3)
    stamp = time.time()
    reference = kinds[0].summary(0, REFERENCE)
    return OverheadRow(f"{stamp:.3f}", costs[0], costs[1], reference.ms, reference.n, round(stamp, 1))


def measure_memory(device: Device) -> list[MemoryRow]:
    """What weights cost that come from main memory: a kernel of many weights among copies of itself, more and more.

    Raises DeviceError when the device cannot run them.
    """
    evict_mb = device.target.protocol.evict_mb
    kernel = replace(REFERENCE, inputs=(MEMORY_SHAPE,), output=MEMORY_SHAPE)
    rows = []
    for copies, evict in ((1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (6, 0.0), (8, 0.0), (1, evict_mb)):
        micro = build([REFERENCE, *[kernel] * copies])
        (told,) = _run(device, micro, (evict,), repeat=2)
        each = [told.summary(i, kernel).ms for i in range(1, copies + 1)]
        stamp = now()
        rows.append(
            MemoryRow(
                f"{copies}+{evict:g} {stamp}",
                working_mb=micro.weight_bytes / 1e6 + evict,
                weights_mb=weight_bytes(kernel) / 1e6,
                raw_ms=float(np.median(each)),
                ref_ms=told.summary(0, REFERENCE).ms,
                time=stamp,
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class _Summary:
    ms: float
    nodes: int
    spread: float
    n: int


@dataclass(frozen=True, slots=True)
class _Told:
    """What the profiler told about one kind of run: ``runs`` (runs, nodes) microseconds, ``owners`` (nodes,) kernels.
    ``disturbed``: most runs were interrupted. An interruption takes milliseconds and can fall on one kernel more often
    than not, so the lower quartile stands for the median then, in the reference kernel too. ``whole``: (runs, 2)
    seconds of a run without the profiler, and whether it was interrupted. ``clock_us``: steps of the profiler's
    clock; where that is coarse a small kernel is hardly ever hit, and its lower quartile would be the clock's.
    """

    runs: np.ndarray
    owners: list[int]
    disturbed: bool
    whole: np.ndarray
    clock_us: float

    def summary(self, index: int, kernel: Kernel) -> _Summary:
        """Raises KernelsFailedError when a kernel has no node of its own in the profile."""
        mine = [column for column, owner in enumerate(self.owners) if owner == index]
        if not mine:
            same = kernel.op == "Pad" and kernel.inputs == (kernel.output,)
            if kernel.op == "Reshape" or same:  # the runtime may drop a copy that changes nothing
                return _Summary(0.0, 0, 0.0, len(self.runs))
            raise KernelsFailedError(f"the runtime made no node of kernel {kernel.key()}")
        us = self.runs[:, mine].sum(axis=1) + 0.5 * len(mine)
        low, middle, high = (float(v) for v in np.quantile(us, (0.25, 0.5, 0.75)))
        small = middle < SMALL_US * self.clock_us
        if self.disturbed and not (small and self.clock_us > 1):
            middle, high = low, min(high, 2 * middle - low)
        elif small:
            middle = _trimmed_mean(us)
        half_width = 1.57 * max(high - low, 0.5 * self.clock_us) / math.sqrt(len(us))
        return _Summary(middle / 1e3, len(mine), half_width / middle, len(us))


def _run(
    device: Device,
    micro: Micro,
    evict_mb: Sequence[float],
    expected_ms: float = 2.0,
    repeat: int = 1,
    compare: bool = False,
) -> list[_Told]:
    """One answer for each entry of ``evict_mb``."""
    protocol = device.target.protocol
    fields = {
        "weights": micro.weights,
        "warmup_ms": protocol.warmup_ms,
        "time_ms": repeat * protocol.kernel_ms,
        "least": LEAST_RUNS,
        "evict_mb": list(evict_mb),
        "compare": compare,
    }
    timeout_s = 30.0 + micro.weight_bytes / MB_PER_S / 1e6 + repeat * protocol.kernel_ms / 50 + expected_ms
    result = device.run(Job("kernels", fields, [micro.model], timeout_s=timeout_s))
    if not result.ok:
        raise KernelsFailedError(f"target {device.target.name}: {result.error}")
    nodes = [(str(name), str(op)) for name, op in result.fields["nodes"]]
    owners = _owners(nodes)
    clock_us = max(1.0, float(result.fields.get("clock_us", 1.0)))
    kinds = []
    for blob, flags, whole in zip(result.blobs, result.fields["interrupted"], result.fields["whole"], strict=True):
        runs = np.frombuffer(blob, np.int32).reshape(-1, len(nodes)).astype(np.float64)
        interrupted = np.array(flags, bool)
        disturbed = 2 * np.count_nonzero(~interrupted) < LEAST_RUNS
        good, plain = _undisturbed(runs, interrupted), np.array(whole, np.float64)
        kinds.append(_Told(good, owners, bool(disturbed), plain, clock_us))
    return kinds


def _undisturbed(samples: np.ndarray, interrupted: np.ndarray) -> np.ndarray:
    """Runs the scheduler did not interrupt; all of them when those are too few: an interruption then falls into one
    node of a run, which medians over the runs pass over."""
    good = samples[~interrupted]
    return good if len(good) >= LEAST_RUNS // 2 else samples


def _owners(nodes: Sequence[tuple[str, str]]) -> list[int]:
    """(name, operator) of the nodes in the order they ran -> the kernel each is charged to, -1 for none.

    Nodes that the runtime makes up carry no branch in their name. A branch runs without a break, so one that is no
    reorder is the kernel of the branch it stands in. A reorder before a node of the kernel, or between what stands
    before it, is the kernel's; one before the reader behind it is the reader's; any other follows an output.
    """
    marks: list[tuple[str, int] | None] = []
    for name, op in nodes:
        match = _BRANCH.match(name)
        if match is None and op not in REORDERS:
            before = next((mark for mark in reversed(marks) if mark), None)
            marks.append(("k", before[1]) if before else None)
        else:
            marks.append((match[1], int(match[2])) if match else None)
    owners = []
    for position, mark in enumerate(marks):
        if mark is not None:
            owners.append(mark[1] if mark[0] == "k" else -1)
            continue
        after = next((m for m in marks[position + 1 :] if m), ("", -1))
        before = next((m for m in reversed(marks[:position]) if m), ("", -1))
        if after[0] == "k" or (after[0] == "p" and after[1] == before[1]):
            owners.append(after[1])
        elif after[0] == "q":
            owners.append(-1)
        else:
            owners.append(before[1] if before[0] == "k" else -1)
    return owners


def _trimmed_mean(values: np.ndarray) -> float:
    """Mean of the middle four fifths."""
    cut = max(1, len(values) // 10) if len(values) > 4 else 0
    return float(np.sort(values)[cut : len(values) - cut].mean())
