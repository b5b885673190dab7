"""A dissected network, a latency model and what every cut costs become the planner's Problem."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgeprune.compress.spans import Anatomy, Span
from edgeprune.latency.kernel import Kernel
from edgeprune.plan.problem import Axis, BlockChoice, GroupChoice, Problem, Ranking, Term

Widths = tuple[int, ...]


def group_candidates(
    anatomy: Anatomy, edges: Callable[[Span, int], Sequence[int]], limit: int = 32
) -> tuple[Widths, ...]:
    """Candidate widths of every group: where a measured stair of one of its kernels ends, and the full width.

    edges(span, variable) gives the counts of that variable that are right edges. A count of a composite variable is
    reached by narrowing one of its groups while the others stay whole.
    """
    groups = anatomy.channels.groups
    found: list[set[int]] = [{group.size} for group in groups]
    sizes = {i: group.size for i, group in enumerate(groups)}
    for span in anatomy.spans:
        for variable, axis in enumerate(span.variables):
            counts = edges(span, variable)
            for g, multiplicity in axis.terms:
                rest = axis.at(sizes) - multiplicity * sizes[g]
                for count in counts:
                    width, remainder = divmod(count - rest, multiplicity)
                    if remainder == 0 and 1 <= width <= sizes[g]:
                        found[g].add(width)
    return tuple(_thinned(sorted(widths), limit) for widths in found)


def _thinned(widths: Sequence[int], limit: int) -> Widths:
    if len(widths) <= limit:
        return tuple(widths)
    picks = np.unique(np.linspace(0, len(widths) - 1, limit).round().astype(int))
    return tuple(widths[i] for i in picks)


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
    budget_ms: float,
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
    terms = [Term("overhead", (), {(): constant_ms})]
    for span in anatomy.spans:
        table = {counts: latency_ms(span.at(counts)) for counts in _counts(span, widths)}
        home = block_index.get(span.block) if span.block is not None else None
        terms.append(Term(span.name, span.variables, table, home))
    return Problem(
        tuple(groups), tuple(BlockChoice(name, block_damage[name]) for name in blocks), tuple(terms), budget_ms
    )
