"""LatencyModel: what a kernel and a network of kernels will take, from the rows of a latency table.

A kernel has its exact row, or lies between rows of its *alignment class*: equal in everything but channel counts, and
those in the same residue modulo the runtime's block of channels, because latency is a staircase in that block. Between
rows it is interpolated (bilinearly in input and output channels: a convolution's work is their product); beyond them,
or between classes, never: that is a TableError naming the kernel.

The plain sum over a network is off by what the profiler and the micro context cost or hide. Whole networks measured on
the same device calibrate it: ``a * sum + b * kernels + c``, non-negative, fitted robustly to relative errors.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from edgeprune.device.target import Fusion
from edgeprune.latency.calibrate import Calibration, build_of, fit
from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import Kernel, Shape, Site
from edgeprune.latency.memory import Footprint, Memory, fit_memory, footprint
from edgeprune.latency.table import LatencyTable

Cell = tuple[int, int, int, int]
REACH = 6  # farther brackets are not looked at
TWO_SIDED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # cost is a product of input and output channels


@dataclass(frozen=True, slots=True)
class Prediction:
    """``source``: "measured", or "interpolated" between rows of the same alignment class."""

    ms: float
    source: str
    spread: float = 0.0


@dataclass(slots=True)
class _Grid:
    """Rows of one alignment class: (x, y) -> key; y is 0 throughout where one count decides."""

    points: dict[tuple[int, int], str] = field(default_factory=dict)
    columns: dict[int, list[int]] = field(default_factory=dict)  # x -> its ys, ascending
    xs: list[int] = field(default_factory=list)
    cells: dict[tuple[int, int], Cell | None] = field(default_factory=dict)

    def add(self, x: int, y: int, key: str) -> None:
        self.points[x, y] = key
        if x not in self.columns:
            bisect.insort(self.xs, x)
        column = self.columns.setdefault(x, [])
        if y not in column:
            bisect.insort(column, y)
        self.cells.clear()

    def cell(self, x: int, y: int) -> Cell | None:
        """A tight (x0, x1, y0, y1) around a point whose corners are all measured."""
        if (x, y) not in self.cells:
            self.cells[x, y] = self._find(x, y)
        return self.cells[x, y]

    def _find(self, x: int, y: int) -> Cell | None:
        at = bisect.bisect_left(self.xs, x)
        exact = at < len(self.xs) and self.xs[at] == x
        lows = self._spanning(reversed(self.xs[: at + exact]), y)
        highs = self._spanning(self.xs[at:], y)
        pairs = sorted(itertools.product(lows, highs), key=lambda pair: math.log(pair[1] + 1) - math.log(pair[0] + 1))
        for x0, x1 in pairs:
            common = self.columns[x0] if x0 == x1 else sorted(set(self.columns[x0]).intersection(self.columns[x1]))
            low, high = bisect.bisect_right(common, y), bisect.bisect_left(common, y)
            if low > 0 and high < len(common):
                return x0, x1, common[low - 1], common[high]
        return None

    def _spanning(self, xs: Iterable[int], y: int) -> list[int]:
        """The first few of ``xs`` measured both at or below ``y`` and at or above it."""
        spanning = (x for x in xs if self.columns[x][0] <= y <= self.columns[x][-1])
        return list(itertools.islice(spanning, REACH))


class LatencyModel:
    """Reads a table; sees rows appended to it later. ``fusion`` names the runtime's block of channels."""

    def __init__(self, table: LatencyTable, fusion: Fusion | None = None):
        self.table = table
        self.fusion = fusion or Fusion()
        self._grids: dict[tuple[object, ...], _Grid] = {}
        self._seen = 0
        self._build: frozenset[tuple[object, ...]] | None = None
        self._fitted_at = (0, 0)
        self._fitted: dict[frozenset[tuple[object, ...]] | None, Calibration] = {}
        self.cold = 1.0
        self._size = Footprint(0.0, 0.0)
        self._memory: tuple[tuple[int, int], Memory] | None = None

    def predict(self, kernel: Kernel, cold: float | None = None) -> Prediction:
        """``cold``: from 0, weights in the caches, to 1; by default that of ``place``, and 1 without it.

        Raises TableError naming the kernel when the table cannot price it."""
        key = kernel.key()
        cold = self.cold if cold is None else cold
        if key in self.table.rows:
            return Prediction(self.table.ms(key, cold), "measured", self.table.rows[key].spread)
        self._index()
        for wild in (1, -1):
            family, x, y = self._place(kernel, wild)
            grid = self._grids.get(family)
            cell = grid.cell(x, y) if grid else None
            if grid and cell:
                x0, x1, y0, y1 = cell
                u = (x - x0) / (x1 - x0) if x1 > x0 else 0.0
                v = (y - y0) / (y1 - y0) if y1 > y0 else 0.0
                corners = ((x0, y0, (1 - u) * (1 - v)), (x1, y0, u * (1 - v)), (x0, y1, (1 - u) * v), (x1, y1, u * v))
                ms = sum(w * self.table.ms(grid.points[cx, cy], cold) for cx, cy, w in corners if w)
                spread = max(self.table.rows[grid.points[cx, cy]].spread for cx, cy, w in corners if w)
                return Prediction(ms, "interpolated", spread)
        self.table.row(key)  # raises
        raise AssertionError("unreachable")

    def missing(self, kernels: Sequence[Kernel]) -> list[Kernel]:
        """The kernels that can be neither looked up nor interpolated, each once."""
        result = {}
        for kernel in kernels:
            key = kernel.key()
            if key not in result and key not in self.table.rows and not self._can_interpolate(kernel):
                result[key] = kernel
        return list(result.values())

    def place(self, kernels: Iterable[Kernel]) -> None:
        """Say what network the kernels stand in: how cold it runs and which networks calibrate it, for ``predict``,
        ``price`` and ``constant_ms``."""
        kernels = list(kernels)
        self._build = build_of(kernels)
        self._size = footprint(kernels)
        self.cold = self.memory.share(self._size)

    def price(self, kernel: Kernel) -> float:
        """The kernel's share of a network in ms: prices plus ``constant_ms`` add up to ``network``, as far as the
        network runs as cold as the one that ``place`` was told."""
        calibration = self.calibration
        return calibration.scale * self.predict(kernel).ms + calibration.per_kernel_ms

    @property
    def constant_ms(self) -> float:
        """What a network takes beside its kernels."""
        calibration = self.calibration
        return calibration.scale * self.memory.touch_ms(self._size) + calibration.constant_ms

    def network(self, model: onnx.ModelProto | Sequence[Site]) -> float:
        """Predicted milliseconds of a whole network on the quiet device, calibrated as far as networks were measured.
        Raises TableError naming the first kernel that has no price."""
        parts = sites(model, self.fusion) if isinstance(model, onnx.ModelProto) else model
        kernels = [site.kernel for site in parts]
        return self._calibrated(build_of(kernels)).apply(self.plain_sum(kernels), len(kernels))

    def plain_sum(self, kernels: Sequence[Kernel]) -> float:
        """A network's kernels in their place and first touches, in ms, before any calibration."""
        size = footprint(kernels)
        cold = self.memory.share(size)
        return sum(self.predict(kernel, cold).ms for kernel in kernels) + self.memory.touch_ms(size)

    @property
    def memory(self) -> Memory:
        stamp = len(self.table.memory), len(self.table.rows)
        if self._memory is None or self._memory[0] != stamp:
            self._memory = (stamp, fit_memory(self.table))
        return self._memory[1]

    @property
    def calibration(self) -> Calibration:
        """For networks like the one that ``place`` was told."""
        return self._calibrated(self._build)

    def _calibrated(self, build: frozenset[tuple[object, ...]] | None) -> Calibration:
        stamp = (len(self.table.networks), len(self.table.rows))
        if self._fitted_at != stamp:
            self._fitted_at = stamp
            self._fitted.clear()
        if build not in self._fitted:
            self._fitted[build] = fit(self.table, build)
        return self._fitted[build]

    def _can_interpolate(self, kernel: Kernel) -> bool:
        self._index()
        for wild in (1, -1):
            family, x, y = self._place(kernel, wild)
            if family in self._grids and self._grids[family].cell(x, y):
                return True
        return False

    def _index(self) -> None:
        if self._seen == len(self.table.rows):
            return
        for key, row in itertools.islice(self.table.rows.items(), self._seen, None):
            if not row.error:
                kernel = Kernel.from_key(key)
                for wild in (1, -1):
                    family, x, y = self._place(kernel, wild)
                    self._grids.setdefault(family, _Grid()).add(x, y, key)
        self._seen = len(self.table.rows)

    def _place(self, kernel: Kernel, wild: int) -> tuple[tuple[object, ...], int, int]:
        """(alignment class, x, y): the kernel without its channel counts, and the counts that decide its time."""
        counts: list[int] = []
        frame: list[Shape] = []
        for shape in (*kernel.inputs, kernel.output):
            if len(shape) < 2:
                frame.append(shape)
                continue
            axis = wild % len(shape)
            counts.append(shape[axis])
            frame.append((*shape[:axis], -1, *shape[axis + 1 :]))
        block = self.fusion.block or 1
        classes = tuple((count % block, count < block) for count in counts)
        family = (wild, kernel.op, kernel.attrs, kernel.tail, kernel.dtype, tuple(frame), classes)
        if kernel.op in TWO_SIDED and len(counts) >= 2 and kernel.attr("group") != "dw":
            return family, counts[0], counts[-1]
        return family, sum(counts), 0


def relative_error(predicted: Sequence[float], measured: Sequence[float]) -> np.ndarray:
    """|predicted / measured - 1|, (n,)."""
    return np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
