"""Which channel counts of a kernel are measured, so that the stairs of its latency can be seen.

Latency over a channel count is a staircase and may even rise when a layer is narrowed. Where the stairs lie is
measured, not assumed: first along each channel count alone (the other one full), then, since a kernel's time depends on
both, on a lattice over the counts that matter, between whose points the model interpolates. Which counts are worth a
plan is decided from all kernels that a channel group touches (pipeline/problem.py).

Stairs repeat with the runtime's block of channels, so long lines are thinned out: every count where they begin, all
of the last block, and a geometric series of whole blocks between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from edgeprune.latency.kernel import Kernel

SHORT = 64  # a line up to here is measured
FINE = 32  # at every count up to here, at multiples of 4 above
MEDIUM = 128  # longer ones: multiples of 4 up to SHORT, of 8 up to here, of a block above, in steps of
STEP = 1.12
LATTICE = 5  # counts per axis and alignment class of a lattice


class SpanLike(Protocol):
    """A kernel of which one or two channel counts vary. ``at`` gives the kernel for a tuple of counts; ``full`` are
    the largest."""

    @property
    def full(self) -> tuple[int, ...]: ...

    def at(self, counts: tuple[int, ...]) -> Kernel: ...


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


def line_rows(spans: Sequence[SpanLike], block: int = 16) -> list[Kernel]:
    """The kernels along every axis of every span, each once: what must be measured to find the stairs."""
    rows: dict[Kernel, None] = {}
    for span in spans:
        rows[span.at(span.full)] = None
        for axis, full in enumerate(span.full):
            for count in line_counts(full, _low(span, axis), block):
                rows[_along(span, axis, count)] = None
    return list(rows)


def _along(span: SpanLike, axis: int, count: int) -> Kernel:
    return span.at((*span.full[:axis], count, *span.full[axis + 1 :]))


def _low(span: SpanLike, axis: int) -> int:
    low: tuple[int, ...] = getattr(span, "low", ()) or (1,) * len(span.full)
    return max(1, low[axis])
