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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.device.device import Fingerprint
from edgeprune.device.target import search_path
from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kernel, measured in one batch. Times are medians as the runtime's profiler told them.

    raw_ms:      the kernel's nodes together, profiler's own cost included
    nodes:       how many nodes the runtime made of it (reorders included)
    ref_ms:      the reference kernel in the same batch, one node
    spread:      half width of the 95 % confidence interval of the median, as a share of it
    n:           runs
    error:       why it could not be measured; the times are 0 then
    """

    key: str
    raw_ms: float = 0.0
    nodes: int = 0
    ref_ms: float = 0.0
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
    """The profiler's own cost per node, and the reference kernel beside it. One per sweep."""

    key: str
    overhead_ms: float
    ref_ms: float
    n: int = 0
    time: float = 0.0


Row = Measurement | NetworkRow | OverheadRow


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
        self._read_to = 0
        self._reference: tuple[int, float, float] | None = None
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
                    known[row.key] = row
                    lines.append(json.dumps({"kind": kind, **_compact(asdict(row))}))
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
        """The reference kernel on the quiet device: best decile over all batches. TableError in an empty table."""
        return self._normal()[0]

    @property
    def overhead_ms(self) -> float:
        """The profiler's own cost per node on the quiet device."""
        return self._normal()[1]

    def ms(self, key: str) -> float:
        """A kernel's time on the quiet device, without the profiler's cost. Raises TableError when there is no row."""
        row = self.row(key)
        reference, overhead = self._normal()
        slowdown = row.ref_ms / (reference + overhead)
        return max(row.raw_ms / slowdown - overhead * row.nodes, 0.02 * row.raw_ms)

    def row(self, key: str) -> Measurement:
        """Raises TableError when the kernel was not measured or could not be."""
        row = self.rows.get(key)
        command = f"`edgeprune profile --target {self.fingerprint.target} --model MODEL`"
        if row is None:
            raise TableError(f"kernel {key} has no row in {self.path.name}; measure it with {command}")
        if row.error:
            raise TableError(f"kernel {key} could not be measured on {self.fingerprint.target}: {row.error}")
        return row

    def _normal(self) -> tuple[float, float]:
        """(reference, overhead per node) in ms; only the ratios to the batch's reference enter."""
        good = [row for row in self.rows.values() if not row.error]
        if not good:
            raise TableError(
                f"latency table {self.path} is empty; fill it with `edgeprune profile --target "
                f"{self.fingerprint.target} --model MODEL`"
            )
        stamp = len(good) + len(self.overheads)
        if self._reference is None or self._reference[0] != stamp:
            raw_reference = float(np.quantile([row.ref_ms for row in good], 0.1))
            shares = [row.overhead_ms / row.ref_ms for row in self.overheads.values()]
            overhead = float(np.median(shares)) * raw_reference if shares else 0.0
            self._reference = (stamp, raw_reference - overhead, overhead)
        return self._reference[1], self._reference[2]

    def _place(self, row: Row) -> tuple[str, dict[str, Any]]:
        if isinstance(row, NetworkRow):
            return "network", self.networks
        if isinstance(row, OverheadRow):
            return "overhead", self.overheads
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
    own = os.environ.get("EDGEPRUNE_HOME")
    if own:
        return Path(own)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "edgeprune"


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
