"""The grid of depth, width and resolution that can really be built from a network, and what its points take.

A point is (d, w, r): blocks kept, the groups' mean share of channels kept, and pixels along a side, each as a share of
the original's. Blocks go in the order of their damage, groups are narrowed uniformly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgeprune.errors import BudgetUnreachableError
from edgeprune.graph.resolution import Size, at_resolution, size_of
from edgeprune.latency.kernel import Kernel
from edgeprune.pipeline.shrink import Judgement, Prices
from edgeprune.pipeline.spans import Anatomy, dissect
from edgeprune.plan.exact import evaluate
from edgeprune.plan.problem import Plan, Problem
from edgeprune.plan.uniform import uniform

Point = tuple[float, float, float]


class GridPrices(Prices, Protocol):
    """What pricing the grid needs beside (pipeline/pricing.py)."""

    def stand_in(self, anatomy: Anatomy, kernels: Sequence[Kernel]) -> None:
        """Measure what is missing of these kernels, and tell prices as they are in this network."""


@dataclass(frozen=True, slots=True)
class Scale:
    """One point: the plan that is applied to the original at ``size``."""

    plan: Plan
    size: Size
    point: Point


class Axes:
    """The steps along the three axes. ``problem`` is the original's, at its own size."""

    def __init__(self, anatomy: Anatomy, judgement: Judgement, problem: Problem):
        self.anatomy, self.problem = anatomy, problem
        self.own = size_of(anatomy.network)
        self.blocks = sorted(judgement.block_damage, key=lambda name: judgement.block_damage[name])
        self.narrowed = [g for g in problem.groups if len(g.widths) > 1]
        self.full_ms = evaluate(problem, {})[0]
        self._uniform = uniform(problem)

    def shallow(self, removed: int) -> Plan:
        return Plan({}, removed=tuple(self.blocks[:removed]))

    def shallow_ms(self, removed: int) -> float:
        return evaluate(self.problem, {}, self.shallow(removed).removed)[0]

    def narrow(self, budgets_ms: Sequence[float]) -> list[Plan]:
        """The widest uniform plans within these budgets, each once; what no width reaches is left out."""
        plans: dict[tuple[tuple[str, int], ...], Plan] = {}
        for budget_ms in budgets_ms:
            try:
                widths = self._uniform(budget_ms).widths
            except BudgetUnreachableError:
                break
            plans.setdefault(tuple(sorted(widths.items())), Plan(dict(widths)))
        return list(plans.values())

    def narrow_ms(self, plan: Plan) -> float:
        """The table's milliseconds of the plan's widths with all blocks in."""
        return evaluate(self.problem, plan.widths)[0]

    def scale(self, removed: int, widths: Mapping[str, int], size: Size) -> Scale:
        """removed: how many blocks; widths: of the groups that are narrowed."""
        depth = 1 - removed / (len(self.blocks) + 1)  # something always stays
        kept = [widths.get(g.name, g.widths[-1]) / g.widths[-1] for g in self.narrowed]
        side = math.sqrt(size[0] * size[1] / (self.own[0] * self.own[1]))
        plan = Plan(dict(widths), removed=self.shallow(removed).removed)
        return Scale(plan, size, (depth, float(np.mean(kept)) if kept else 1.0, side))

    def combinations(self, removed: int, widths: Sequence[Plan], sizes: Sequence[Size]) -> list[Scale]:
        """All of up to ``removed`` blocks x widths x sizes."""
        steps = itertools.product(sizes, range(removed + 1), widths)
        return [self.scale(count, plan.widths, size) for size, count, plan in steps]


def price(axes: Axes, scales: Sequence[Scale], prices: GridPrices) -> np.ndarray:
    """(n,) the table's milliseconds of all points; what it lacks is measured, one size after the other."""
    result = np.zeros(len(scales))
    for size in dict.fromkeys(scale.size for scale in scales):
        anatomy = dissect(at_resolution(axes.anatomy.network, size), prices.fusion)
        mine = [i for i, scale in enumerate(scales) if scale.size == size]
        parts = [_kernels(anatomy, scales[i].plan) for i in mine]
        prices.stand_in(anatomy, [kernel for kernels in parts for kernel in kernels])
        for i, kernels in zip(mine, parts, strict=True):
            result[i] = prices.constant_ms() + math.fsum(prices.kernel_ms(kernel) for kernel in kernels)
    return result


def _kernels(anatomy: Anatomy, plan: Plan) -> list[Kernel]:
    """The kernels that are left of a network."""
    widths = {i: plan.widths.get(g.name, g.size) for i, g in enumerate(anatomy.channels.groups)}
    gone = {i for i, block in enumerate(anatomy.blocks) if block.name in plan.removed}
    return [span.at(tuple(v.at(widths) for v in span.variables)) for span in anatomy.spans if span.block not in gone]
