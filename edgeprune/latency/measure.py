"""One batch of kernels on the device: build, run, and give each kernel the time of the nodes the runtime made of it.

The runtime's profiler counts whole microseconds and rounds down; half a microsecond a node is added back. A median of
whole numbers cannot resolve a kernel of few microseconds, so below 50 us the mean of the middle four fifths of the runs
is taken: robust against what disturbs a run, and averaging the rounding away. The profiler also costs 2 to 3 us a node,
which running the same model without it reveals.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from edgeprune.device.device import Job, PipeDevice, Result
from edgeprune.errors import DeviceError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.micro import build
from edgeprune.latency.table import Measurement, OverheadRow, now

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
SMALL_US = 50.0
LEAST_RUNS = 12
OVERHEAD_KERNELS = 32
MB_PER_S = 50.0  # slowest link and session creation that is waited for
_BRANCH = re.compile(r"([kpq])(\d+)_")


class KernelsFailedError(DeviceError):
    """The device refused a batch; one of its kernels is at fault."""


def measure_batch(device: PipeDevice, kernels: Sequence[Kernel], expected_ms: float = 3.0) -> list[Measurement]:
    """Measure kernels side by side with the reference kernel. ``expected_ms``: about what one run of all takes.

    Raises KernelsFailedError when the device answers that the batch failed, DeviceLostError when it does not answer,
    TableError for a kernel that cannot be rebuilt.
    """
    protocol = device.target.protocol
    micro = build([REFERENCE, *kernels])
    fields = {
        "weights": micro.weights,
        "warmup_ms": protocol.warmup_ms,
        "time_ms": protocol.kernel_ms,
        "compare": False,
        "least": LEAST_RUNS,
    }
    timeout_s = 20.0 + micro.weight_bytes / MB_PER_S / 1e6 + 20 * (protocol.kernel_ms + 40 * expected_ms) / 1e3
    result = device.run(Job("kernels", fields, [micro.model], timeout_s=timeout_s))
    if not result.ok:
        raise KernelsFailedError(f"target {device.target.name}: {result.error}")
    return read_batch(result, kernels)


def read_batch(result: Result, kernels: Sequence[Kernel]) -> list[Measurement]:
    """Raises KernelsFailedError when a kernel has no node of its own in the profile."""
    nodes, micros, interrupted = _profile(result)
    runs = _undisturbed(micros, interrupted)
    owners = _owners(nodes)
    reference = _summary(runs, owners, 0, REFERENCE)
    rows = []
    for index, kernel in enumerate(kernels, start=1):
        row = _summary(runs, owners, index, kernel)
        rows.append(replace(row, ref_ms=reference.raw_ms))
    return rows


def measure_overhead(device: PipeDevice) -> OverheadRow:
    """What the profiler costs per node: many small kernels with and without it, taking turns.

    Raises DeviceError when the device cannot run them.
    """
    protocol = device.target.protocol
    shape = (1, 16, 32, 32)
    micro = build([REFERENCE, *[replace(REFERENCE, inputs=(shape,), output=shape)] * OVERHEAD_KERNELS])
    fields = {
        "weights": micro.weights,
        "warmup_ms": protocol.warmup_ms,
        "time_ms": 3 * protocol.kernel_ms,
        "least": 3 * LEAST_RUNS,
        "compare": True,
    }
    result = device.run(Job("kernels", fields, [micro.model]))
    if not result.ok:
        raise KernelsFailedError(f"target {device.target.name}: {result.error}")
    nodes, runs, interrupted = _profile(result)
    whole = np.array(result.fields["whole"], np.float64)
    pairs = np.stack([runs.sum(axis=1) + 0.5 * len(nodes), whole[:, 0] * 1e6], axis=1)
    pairs = _undisturbed(pairs, interrupted | (whole[:, 1] != 0))
    overhead_us = float(np.median(pairs[:, 0] - pairs[:, 1])) / len(nodes)
    reference = _summary(_undisturbed(runs, interrupted), _owners(nodes), 0, REFERENCE)
    stamp = time.time()
    return OverheadRow(f"{stamp:.3f}", max(0.0, overhead_us) / 1e3, reference.raw_ms, len(pairs), round(stamp, 1))


def _profile(result: Result) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(node names, microseconds (runs, nodes), interrupted (runs,)) of an agent's answer."""
    nodes = [str(name) for name, _ in result.fields["nodes"]]
    micros = np.frombuffer(result.blobs[0], np.int32).reshape(-1, len(nodes)).astype(np.float64)
    return nodes, micros, np.array(result.fields["interrupted"], bool)


def _undisturbed(samples: np.ndarray, interrupted: np.ndarray) -> np.ndarray:
    """Runs the scheduler did not interrupt; all of them when those are too few."""
    good = samples[~interrupted]
    return good if len(good) >= 5 else samples


def _owners(nodes: Sequence[str]) -> list[int]:
    """The kernel each node is charged to, -1 for none. Reorders carry no name: one that comes before a node of a
    kernel is that kernel's, one before the reader behind a kernel is the reader's, any other follows an output."""
    marks = [_BRANCH.match(name) for name in nodes]
    owners = []
    for position, mark in enumerate(marks):
        if mark is not None:
            owners.append(int(mark[2]) if mark[1] == "k" else -1)
            continue
        after = next((m for m in marks[position + 1 :] if m is not None), None)
        before = next((m for m in reversed(marks[:position]) if m is not None), None)
        if after is not None and after[1] in "kq":
            owners.append(int(after[2]) if after[1] == "k" else -1)
        else:
            owners.append(int(before[2]) if before is not None and before[1] == "k" else -1)
    return owners


def _summary(runs: np.ndarray, owners: list[int], index: int, kernel: Kernel) -> Measurement:
    mine = [column for column, owner in enumerate(owners) if owner == index]
    if not mine:
        if kernel.op == "Reshape":  # the runtime may drop a copy that changes nothing
            return Measurement(kernel.key(), raw_ms=0.0, nodes=0, spread=0.0, n=len(runs), time=now())
        raise KernelsFailedError(f"the runtime made no node of kernel {kernel.key()}")
    us = runs[:, mine].sum(axis=1) + 0.5 * len(mine)
    low, middle, high = (float(v) for v in np.quantile(us, (0.25, 0.5, 0.75)))
    if middle < SMALL_US:
        cut = len(us) // 10
        middle = float(np.sort(us)[cut : len(us) - cut].mean())
    half_width = 1.57 * max(high - low, 0.5) / math.sqrt(len(us))
    return Measurement(
        kernel.key(), raw_ms=middle / 1e3, nodes=len(mine), spread=half_width / middle, n=len(us), time=now()
    )
