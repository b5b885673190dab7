"""LatencyTable: every measurement made on one device, as JSON lines in one file per fingerprint.

The first line holds the fingerprint; after it one line per measured kernel or network. Raw medians are stored, together
with the reference kernel's median in the same batch; what is comparable across batches is their ratio, so a row's time
is ``ratio * reference``, the reference being the best decile over the table (a quiet machine).

A line is appended under a lock and synced; a line torn by a crash is dropped on reading and overwritten by the next
append. Keys already in the file are not written again, whoever measured them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.device.device import Fingerprint
from edgeprune.device.target import own_folder, search_path
from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kernel, measured in one batch. Times are medians as the runtime's profiler told them.

    hot_ms:       the kernel's nodes together, profiler's own cost included, with its weights in the caches
    cold_ms:      the same with the caches emptied before each run
    nodes:        how many nodes the runtime made of it (reorders included)
    hot_ref_ms:   the reference kernel in the same batch, one node
    cold_ref_ms:  the same with the caches emptied
    small_ref_ms: a kernel of some 25 us beside it, hot; it shows disturbances that small kernels feel and large ones
                  hide
    spread:       half width of the 95 % confidence interval of the median, as a share of it
    n:            runs of each kind
    error:        why it could not be measured; the times are 0 then
    """

    key: str
    hot_ms: float = 0.0
    cold_ms: float = 0.0
    nodes: int = 0
    hot_ref_ms: float = 0.0
    cold_ref_ms: float = 0.0
    small_ref_ms: float = 0.0
    spread: float = 0.0
    n: int = 0
    time: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class NetworkRow:
    """One whole network, measured interleaved with the reference network; for calibration.

    keys:      the keys of its kernels, in graph order
    ratio:     its median over the reference network's, whose time is ``REFERENCE_CONVS`` reference kernels
    spread, n: as in Measurement
    """

    key: str
    keys: tuple[str, ...]
    ratio: float
    spread: float = 0.0
    n: int = 0
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class OverheadRow:
    """The profiler's own cost per node, hot and cold, and the reference kernel beside it, hot. One per sweep."""

    key: str
    hot_ms: float
    cold_ms: float
    ref_ms: float
    n: int = 0
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """A kernel of ``weights_mb`` megabytes of weights, measured where one run touches ``working_mb`` in all."""

    key: str
    working_mb: float
    weights_mb: float
    raw_ms: float
    ref_ms: float
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class StairsRow:
    """One network whose stairs are measured and calibrated to the end: the candidate widths of its groups, by name.
    Written once, so that rows which come later (another network's) move no edge and ask for nothing more."""

    key: str
    widths: Mapping[str, Sequence[int]]
    time: float = 0.0


Row = Measurement | NetworkRow | OverheadRow | MemoryRow | StairsRow


@dataclass(frozen=True, slots=True)
class _Normal:
    """The reference kernel as the profiler tells it, hot and cold, and the profiler's cost per node."""

    stamp: int
    hot_ms: float
    cold_ms: float
    hot_overhead_ms: float
    cold_overhead_ms: float


class LatencyTable:
    """Use ``open_table`` for the table of a device. ``rows`` maps kernel keys to measurements, ``networks`` network
    keys to whole-network rows; both grow by ``append`` only."""

    def __init__(self, path: Path, fingerprint: Fingerprint):
        """Reads ``path`` if it exists. Raises TableError when it is another device's table or not a table."""
        self.path = path
        self.fingerprint = fingerprint
        self.rows: dict[str, Measurement] = {}
        self.networks: dict[str, NetworkRow] = {}
        self.overheads: dict[str, OverheadRow] = {}
        self.memory: dict[str, MemoryRow] = {}
        self.stairs: dict[str, StairsRow] = {}
        self._read_to = 0
        self._reference: _Normal | None = None
        self.reload()

    def reload(self) -> None:
        """Take in what other processes appended."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            self._take(file.read())

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows whose keys are new and flush them to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(), self.path.open("a+b") as file:
            file.seek(self._read_to)
            self._take(file.read())
            file.truncate(self._read_to)  # a line that a crash tore
            lines = []
            if self._read_to == 0:
                lines.append(json.dumps({"format": FORMAT, "fingerprint": asdict(self.fingerprint)}))
            for row in rows:
                kind, known = self._place(row)
                if row.key not in known:
                    document = _compact(asdict(row))
                    known[row.key] = type(row)(**document)
                    lines.append(json.dumps({"kind": kind, **document}))
            data = "".join(line + "\n" for line in lines).encode()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._read_to += len(data)
        self._reference = None

    def missing(self, kernels: Sequence[Kernel]) -> list[Kernel]:
        """The kernels without a row, each once, in the order given. A row that says a kernel failed is a row."""
        return [k for key, k in {k.key(): k for k in kernels}.items() if key not in self.rows]

    @property
    def reference_ms(self) -> float:
        """The reference kernel, hot, on the quiet device: best decile over all batches. TableError if empty."""
        return self._normal().hot_ms - self._normal().hot_overhead_ms

    @property
    def overhead_ms(self) -> float:
        """The profiler's own cost per node on the quiet device."""
        return self._normal().hot_overhead_ms

    def ms(self, key: str, cold: float = 1.0) -> float:
        """A kernel's time on the quiet device, without the profiler's cost; ``cold`` from 0, weights in the caches,
        to 1. Raises TableError when there is no row."""
        row = self.row(key)
        normal = self._normal()
        if not row.nodes:
            return 0.0
        hot = row.hot_ms * normal.hot_ms / row.hot_ref_ms - normal.hot_overhead_ms * row.nodes
        far = row.cold_ms * normal.cold_ms / row.cold_ref_ms - normal.cold_overhead_ms * row.nodes
        hot = max(hot, 0.02 * row.hot_ms)
        return hot + cold * (max(hot, far) - hot)

    def row(self, key: str) -> Measurement:
        """Raises TableError when the kernel was not measured or could not be."""
        row = self.rows.get(key)
        command = f"`edgeprune profile --target {self.fingerprint.target} --model MODEL`"
        if row is None:
            raise TableError(f"kernel {key} has no row in {self.path.name}; measure it with {command}")
        if row.error:
            raise TableError(f"kernel {key} could not be measured on {self.fingerprint.target}: {row.error}")
        return row

    def _normal(self) -> _Normal:
        stamp = len(self.rows) + len(self.overheads)
        if self._reference is not None and self._reference.stamp == stamp:
            return self._reference
        good = [row for row in self.rows.values() if not row.error and row.nodes]
        if not good:
            raise TableError(
                f"latency table {self.path} is empty; fill it with `edgeprune profile --target "
                f"{self.fingerprint.target} --model MODEL`"
            )
        hot = float(np.quantile([row.hot_ref_ms for row in good], 0.1))
        cold = float(np.quantile([row.cold_ref_ms for row in good], 0.1))
        shares = [(row.hot_ms / row.ref_ms, row.cold_ms / row.ref_ms) for row in self.overheads.values()]
        overhead = np.median(shares, axis=0) * hot if shares else np.zeros(2)
        self._reference = _Normal(stamp, hot, cold, float(overhead[0]), float(overhead[1]))
        return self._reference

    def _place(self, row: Row) -> tuple[str, dict[str, Any]]:
        if isinstance(row, NetworkRow):
            return "network", self.networks
        if isinstance(row, OverheadRow):
            return "overhead", self.overheads
        if isinstance(row, MemoryRow):
            return "memory", self.memory
        if isinstance(row, StairsRow):
            return "stairs", self.stairs
        return "kernel", self.rows

    def _take(self, data: bytes) -> None:
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            self._line(line)
            self._read_to += len(line)

    def _line(self, line: bytes) -> None:
        try:
            document = json.loads(line)
            if self._read_to == 0:
                found = Fingerprint(**document["fingerprint"])
                if document["format"] != FORMAT or found != self.fingerprint:
                    raise TableError(f"{self.path} belongs to {_difference(found, self.fingerprint)}; rows never mix")
                return
            kind = document.pop("kind")
            row: Row
            if kind == "kernel":
                row = Measurement(**document)
            elif kind == "network":
                row = NetworkRow(**{**document, "keys": tuple(document["keys"])})
            elif kind == "overhead":
                row = OverheadRow(**document)
            elif kind == "memory":
                row = MemoryRow(**document)
            elif kind == "stairs":
                row = StairsRow(**document)
            else:
                raise ValueError(f"unknown kind {kind!r}")
            self._place(row)[1].setdefault(row.key, row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TableError(
                f"{self.path} is damaged at byte {self._read_to} ({error}); delete it and profile again"
            ) from None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with self.path.with_suffix(".lock").open("a+b") as file:
            try:
                import fcntl
            except ImportError:  # Windows: one process at a time
                yield
                return
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _compact(document: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) and k != "time" else v for k, v in document.items()}


def _difference(found: Fingerprint, wanted: Fingerprint) -> str:
    a, b = asdict(found), asdict(wanted)
    parts = [f"{name} {a[name]!r} instead of {b[name]!r}" for name in a if a[name] != b[name]]
    return "a device with " + (", ".join(parts) or "another table format")


def now() -> float:
    return round(time.time(), 1)


def cache_home() -> Path:
    """Where own measurements lie: $EDGEPRUNE_HOME, else the user's cache directory."""
    return own_folder("XDG_CACHE_HOME", ".cache")


def table_path(fingerprint: Fingerprint) -> Path:
    folder = re.sub(r"[^\w.-]", "_", fingerprint.target)
    return cache_home() / "profiles" / folder / f"{fingerprint.digest()}.jsonl"


def open_table(fingerprint: Fingerprint) -> LatencyTable:
    """The user's own table of that device; empty when nothing was measured yet."""
    return LatencyTable(table_path(fingerprint), fingerprint)


def shipped_tables(target: str) -> list[Path]:
    """Tables measured elsewhere on a device of that target, the user's own folder first: a first guess for planning
    without the device, never taken without being asked for by path."""
    return [path for place in search_path("profiles") for path in sorted((place / target).glob("*.jsonl"))]
