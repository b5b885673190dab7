"""What it costs to take residual blocks out, in the unit of ``Ranking.damage``.

Blocks are judged in the order in which they would go: the cheapest goes first, and what the others cost is measured
without it, since neighbours cost more together than the sum of both. Every removal is measured after a cheap local
repair: the layers that aim elsewhere now (the block before the gap) and the next join are refitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from edgeprune.graph.blocks import Block
from edgeprune.prune.aims import Fit, find_fits
from edgeprune.prune.compensate import refit
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program

ROWS = 8192  # sampled positions of a local refit
TINY = 1e-9  # a removal never counts as nothing: of two free ones a planner should take the faster


def block_damage(
    judge: Judge, blocks: Sequence[Block], steps: int | None = None, *, repair: bool = True
) -> dict[str, float]:
    """Block name -> growth of the output's relative squared error when it is removed after all cheaper ones.

    steps: how many removals are followed (default: half of the blocks, at least 2); blocks beyond keep the price
        they had at the last look. Prices never fall along the order. The judge is left as it was.
    repair: False where the judge's images mean nothing and no repair will follow
    """
    start = judge.program
    steps = max(2, math.ceil(len(blocks) / 2)) if steps is None else steps
    damage: dict[str, float] = {}
    price: dict[str, float] = {}
    left = {b.name: b for b in blocks if b.join in judge.order}
    try:
        for step in range(min(steps, len(left))):
            fits = find_fits(judge.reference.program, judge.program, judge.reference.inner)
            best: tuple[float, str, Program, set[str]] | None = None
            for name in sorted(left, key=lambda n: price.get(n, 0.0)):
                if best is not None and name in price and price[name] >= best[0]:
                    continue  # it was dearer with more blocks in, and only grows
                trial, changed = without_block(judge, left[name], fits, repair)
                price[name] = judge.error(trial, changed) - judge.divergence
                if best is None or price[name] < best[0]:
                    best = (price[name], name, trial, changed)
            assert best is not None
            damage[best[1]] = max(best[0], TINY, *damage.values())
            del left[best[1]]
            if left and step + 1 < steps:
                judge.settle(*best[2:])
    finally:
        if judge.program is not start:
            judge.settle(start)
    floor = max(damage.values(), default=TINY)
    return damage | {name: max(price[name], floor) for name in left}


def without_block(judge: Judge, block: Block, fits: Sequence[Fit], repair: bool = True) -> tuple[Program, set[str]]:
    """The judge's program without the block, locally repaired, and the nodes that now give other values for the same
    inputs. fits: ``find_fits`` of the judge's program."""
    program = judge.program.without(block)
    if not repair:
        return program, {block.join}
    now = find_fits(judge.reference.program, program, judge.reference.inner)
    aims = {f.node: f.aim for f in fits}
    affected = [f for f in now if aims[f.node] != f.aim]
    behind = [f for f in now if judge.order[f.node] > judge.order[block.join]]
    affected += [f for f in behind if f.other is not None][:1] or behind[:1]
    changed = {block.join, *(f.node for f in affected), *(f.norm for f in affected if f.norm)}
    alive = {n.name for n in program.nodes}
    known = {n: v for n, v in judge.known_before(changed, fitting=True).items() if n in alive}
    modules: Mapping[str, nn.Module] = refit(
        judge.reference,
        program,
        fits=now,
        only={f.node for f in affected},
        kept=judge.kept,
        known=known,
        rows=ROWS,
        quick=True,
    )
    return program.exchanged(modules), changed
