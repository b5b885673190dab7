"""Synthetic latency tables for tests: a fingerprint, kernels, and rows with times of one's choosing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgeprune.device.device import Fingerprint
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.measure import REFERENCE
from edgeprune.latency.table import LatencyTable, Measurement

FINGERPRINT = Fingerprint(
    "cpu", "board", "arch", "os", "onnxruntime", "1.0", "CPUExecutionProvider", "fp32", 1, "ep-lat-1", "abc"
)
REF_MS = 0.2


def conv(c_in: int, c_out: int, size: int = 28) -> Kernel:
    return replace(REFERENCE, inputs=((1, c_in, size, size),), output=(1, c_out, size, size))


def row(kernel: Kernel, ms: float, cold_ms: float | None = None, spread: float = 0.001) -> Measurement:
    return Measurement(kernel.key(), ms, cold_ms or ms, 1, REF_MS, REF_MS, REF_MS / 8, spread, 20, 1.0)


def table_of(path: Path, kernels: list[Kernel], ms: Callable[[Kernel], float]) -> LatencyTable:
    table = LatencyTable(path / "table.jsonl", FINGERPRINT)
    table.append([row(kernel, ms(kernel)) for kernel in kernels])
    return table
