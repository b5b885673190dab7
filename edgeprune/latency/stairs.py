"""Candidate widths: the right edges of the measured stairs.

Latency over a channel count is a staircase and may even rise when a layer is narrowed. A count is an *edge* when no
larger one is equally fast or faster: between two edges, widening costs nothing and gives accuracy back. Where the
stairs lie is measured, not assumed: first along each channel count alone (the other one full), then, since a kernel's
time depends on both, on a lattice over the edges, between whose points the model interpolates.

Stairs repeat with the runtime's block of channels, so long lines are thinned out: short ones are measured count by
count where they begin; longer ones in quarters of a block there and at their end, in a geometric series between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.predict import LatencyModel

SHORT = 64  # a line up to here is measured
FINE = 32  # at every count up to here, at multiples of 4 above
MEDIUM = 128  # longer ones: multiples of 4 up to SHORT, of 8 up to here, of a block above, in steps of
STEP = 1.12
TOLERANCE = 0.01  # counts this close in time are equally fast
LATTICE = 5  # counts per axis and alignment class of a lattice


class SpanLike(Protocol):
    """A kernel of which one or two channel counts vary. ``at`` gives the kernel for a tuple of counts; ``full`` are
    the largest."""

    @property
    def full(self) -> tuple[int, ...]: ...

    def at(self, counts: tuple[int, ...]) -> Kernel: ...


@dataclass(frozen=True, slots=True)
class Span:
    """The plainest SpanLike; ``low`` are the smallest counts worth considering."""

    name: str
    at: Callable[[tuple[int, ...]], Kernel]
    full: tuple[int, ...]
    low: tuple[int, ...] = ()


def line_counts(full: int, low: int = 1, block: int = 16) -> list[int]:
    """The counts measured along one axis, ascending, ``full`` included."""
    counts = {full, *range(0, min(full, SHORT) + 1, 4), *range(SHORT, min(full, MEDIUM) + 1, 8)}
    if full <= SHORT:
        counts |= set(range(low, min(full, FINE) + 1))
    counts |= set(range(full - full % 4, max(low, full - block) - 1, -4))
    value = float(MEDIUM)
    while value < full:
        counts.add(round(value / block) * block)
        value *= STEP
    return sorted(c for c in counts if low <= c <= full)


def lattice(counts: Iterable[int], limit: int = LATTICE, block: int = 16) -> list[int]:
    """A geometric subset of at most ``limit`` counts per alignment class, both ends of each class included, so that
    everything between can be interpolated without leaving the class."""
    classes: dict[tuple[int, bool], list[int]] = {}
    for count in sorted(set(counts)):
        classes.setdefault((count % block, count < block), []).append(count)
    chosen: set[int] = set()
    for members in classes.values():
        first, last = members[0], members[-1]
        chosen |= {first, last}
        for i in range(1, limit - 1):
            wanted = first * (last / first) ** (i / (limit - 1))
            chosen.add(min(members, key=lambda c: abs(c - wanted)))
    return sorted(chosen)


def edges(model: LatencyModel, span: SpanLike, axis: int, counts: Iterable[int]) -> list[int]:
    """Among ``counts`` of one axis (the others full) those for which no larger count is equally fast or faster,
    ascending. Counts the model cannot price are left out; the full count is always an edge.

    Two times are equal when they differ by less than 1 %, or than what their own spread explains.
    """
    full = span.full[axis]
    fastest, spread = float("inf"), 0.0
    result = []
    for count in sorted({*counts, full}, reverse=True):
        try:
            prediction = model.predict(_along(span, axis, count))
        except TableError:
            if count == full:
                raise
            continue
        noise = min(0.03, (prediction.spread**2 + spread**2) ** 0.5)
        if prediction.ms < fastest * (1 - max(TOLERANCE, noise)):
            result.append(count)
        if prediction.ms < fastest:
            fastest, spread = prediction.ms, prediction.spread
    return result[::-1]


def line_rows(spans: Sequence[SpanLike], block: int = 16) -> list[Kernel]:
    """The kernels along every axis of every span, each once: what must be measured to find the stairs."""
    rows: dict[Kernel, None] = {}
    for span in spans:
        rows[span.at(span.full)] = None
        for axis, full in enumerate(span.full):
            for count in line_counts(full, _low(span, axis), block):
                rows[_along(span, axis, count)] = None
    return list(rows)


def lattice_rows(model: LatencyModel, spans: Sequence[SpanLike], limit: int = LATTICE) -> list[Kernel]:
    """The kernels on the lattices over the edges, for spans of two axes whose lines were measured."""
    block = model.fusion.block or 1
    rows: dict[Kernel, None] = {}
    for span in spans:
        if len(span.full) < 2:
            continue
        axes = []
        for axis, full in enumerate(span.full):
            found = edges(model, span, axis, line_counts(full, _low(span, axis), block))
            axes.append(lattice(found, limit, block))
        for counts in itertools.product(*axes):
            rows[span.at(counts)] = None
    return list(rows)


def wanted_rows(spans: Sequence[SpanLike], model: LatencyModel | None = None) -> list[Kernel]:
    """What to measure: the lines without a model, the lattices with one whose table holds the lines."""
    return line_rows(spans) if model is None else lattice_rows(model, spans)


def _along(span: SpanLike, axis: int, count: int) -> Kernel:
    return span.at((*span.full[:axis], count, *span.full[axis + 1 :]))


def _low(span: SpanLike, axis: int) -> int:
    low: tuple[int, ...] = getattr(span, "low", ()) or (1,) * len(span.full)
    return max(1, low[axis])
