"""A dissected network, a latency model and what every cut costs become the planner's Problem."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgeprune.latency.kernel import Kernel, multiply_adds
from edgeprune.pipeline.spans import Anatomy, Span
from edgeprune.plan.problem import Axis, BlockChoice, GroupChoice, Problem, Ranking, Term

Widths = tuple[int, ...]

EDGE = 0.02  # a narrower group must be faster by this share to be worth a candidate


def group_candidates(anatomy: Anatomy, price: Callable[[Kernel], float | None], limit: int = 16) -> tuple[Widths, ...]:
    """Candidate widths of every group, ascending: the right edges of its measured stairs, and the full width.

    A group's stairs are what all kernels that touch it take together when it alone is narrowed. A width is an edge
    when every larger one takes longer, by more than noise: between two edges, widening costs nothing. Of the edges
    those stay that are worth their width, at most ``limit``.
    price: kernel -> ms, None where the table does not say; widths with a kernel of unknown price are left out
    """
    result = []
    for g, group in enumerate(anatomy.channels.groups):
        stairs = _stairs(anatomy, g, price)
        found = _worthwhile(stairs, _edges(stairs), limit)
        result.append(tuple(sorted({*found, group.size})))
    return tuple(result)


def _stairs(anatomy: Anatomy, group: int, price: Callable[[Kernel], float | None]) -> dict[int, float]:
    """Width -> ms of all kernels that touch the group, the other groups being whole."""
    size = anatomy.channels.groups[group].size
    sizes = {i: g.size for i, g in enumerate(anatomy.channels.groups)}
    touching = [
        (span, tuple(axis.at({**sizes, group: 0}) for axis in span.variables), _slopes(span, group))
        for span in anatomy.spans
        if any(g == group for axis in span.variables for g, _ in axis.terms)
    ]
    result: dict[int, float] = {}
    for width in range(1, size + 1):
        total = 0.0
        for span, rest, slopes in touching:
            ms = price(span.at(tuple(r + s * width for r, s in zip(rest, slopes, strict=True))))
            if ms is None:
                break
            total += ms
        else:
            result[width] = total
    return result


def _slopes(span: Span, group: int) -> tuple[int, ...]:
    """How fast each variable of a span grows with the width of one group."""
    return tuple(sum(m for g, m in axis.terms if g == group) for axis in span.variables)


def _edges(stairs: Mapping[int, float]) -> list[int]:
    """Widths that are faster than every larger one by more than ``EDGE`` of it; the largest is one."""
    found: list[int] = []
    fastest = float("inf")
    for width in sorted(stairs, reverse=True):
        if stairs[width] < fastest * (1 - EDGE):
            found.append(width)
            fastest = stairs[width]
    return found[::-1]


def _worthwhile(stairs: Mapping[int, float], edges: Sequence[int], limit: int) -> list[int]:
    """Drop, one by one, the edge that lies highest above the line between its neighbours, while there are more than
    ``limit`` or one lies above by ``EDGE``: for its time a little less or more width is the better bargain."""
    kept = list(edges)
    while len(kept) > 2:
        excess = []
        for low, mid, high in zip(kept, kept[1:], kept[2:], strict=False):
            line = stairs[low] + (stairs[high] - stairs[low]) * (mid - low) / (high - low)
            excess.append(stairs[mid] / line - 1)
        worst = int(np.argmax(excess))
        if len(kept) <= limit and excess[worst] <= EDGE:
            break
        del kept[worst + 1]
    return kept


def attainable(axis: Axis, candidates: Sequence[Widths]) -> tuple[int, ...]:
    """All values an axis can take when its groups take their candidate widths."""
    values = {axis.const}
    for g, multiplicity in axis.terms:
        values = {v + multiplicity * w for v in values for w in candidates[g]}
    return tuple(sorted(values))


def needed_kernels(anatomy: Anatomy, candidates: Sequence[Widths]) -> dict[str, Kernel]:
    """Every kernel that a plan over these candidates can contain, by key."""
    return {(kernel := span.at(counts)).key(): kernel for span in anatomy.spans for counts in _counts(span, candidates)}


def _counts(span: Span, candidates: Sequence[Widths]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(attainable(axis, candidates) for axis in span.variables)))


def build_problem(
    anatomy: Anatomy,
    candidates: Sequence[Widths],
    latency_ms: Callable[[Kernel], float],
    constant_ms: float,
    rankings: Mapping[str, Ranking],
    block_damage: Mapping[str, float],
    budget_ms: float = 0.0,
) -> Problem:
    """latency_ms: calibrated milliseconds of one kernel; constant_ms: what the network costs beside its kernels.

    A group without a ranking keeps its full width; a block without a damage stays.
    """
    blocks = [b.name for b in anatomy.blocks if b.name in block_damage]
    block_index = {i: blocks.index(b.name) for i, b in enumerate(anatomy.blocks) if b.name in block_damage}
    widths = [
        candidates[i] if group.name in rankings else (group.size,) for i, group in enumerate(anatomy.channels.groups)
    ]
    groups = []
    for i, group in enumerate(anatomy.channels.groups):
        damage = rankings[group.name].damage if group.name in rankings else np.zeros(group.size + 1)
        block = anatomy.group_blocks[i]
        home = block_index.get(block) if block is not None else None
        groups.append(GroupChoice(group.name, widths[i], tuple(float(damage[w]) for w in widths[i]), home))
    terms = [Term("overhead", (), {(): constant_ms}, macs={(): 0})]
    for span in anatomy.spans:
        kernels = {counts: span.at(counts) for counts in _counts(span, widths)}
        table = {counts: latency_ms(kernel) for counts, kernel in kernels.items()}
        macs = {counts: multiply_adds(kernel) for counts, kernel in kernels.items()}
        home = block_index.get(span.block) if span.block is not None else None
        terms.append(Term(span.name, span.variables, table, home, macs))
    return Problem(
        tuple(groups), tuple(BlockChoice(name, block_damage[name]) for name in blocks), tuple(terms), budget_ms
    )
