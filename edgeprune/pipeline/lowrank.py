"""Which convolutions become triples of thinner ones, before anything is cut: where the table says that the triple is
faster, and its damage for each millisecond is below what narrowing pays.

    offers     every factorable convolution, one side or both, at ranks of whole blocks of channels, kernel by kernel
    price      what the exact plan to the same budget pays for its last milliseconds, in damage per ms
    choice     for each layer the offer that gains most at that price: price * ms saved - damage of the network's output
    proof      the chosen network, repaired, is timed whole, and the plan from there to the budget has to hurt less than
               the plan from the original; where it does not, half of the choice is tried, then nothing is done

What is left is an ordinary network: inner ranks are channel groups like any others in the rounds that follow.

Source: the low-rank form of Purohit et al. (TMLR 2024). Deviations: the paper factors every layer at both sides and
counts parameters; here most layers stay as they are, since each 1x1 is one more kernel to run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from edgeprune.errors import BudgetUnreachableError, TableError
from edgeprune.graph.factor import Triple, factorable, factored, inner_layers, insert
from edgeprune.graph.network import Network
from edgeprune.latency.kernel import Kernel
from edgeprune.pipeline.apply import State
from edgeprune.pipeline.fit import AIM
from edgeprune.pipeline.grid import GridPrices
from edgeprune.pipeline.learned import Judging
from edgeprune.pipeline.problem import Widths
from edgeprune.pipeline.shrink import predicted_ms, problem_of, refuse_unreachable
from edgeprune.pipeline.spans import Anatomy, dissect
from edgeprune.plan.exact import evaluate, exact
from edgeprune.plan.problem import Factoring, Problem
from edgeprune.prune import lowrank
from edgeprune.prune.judge import Judge as OutputJudge
from edgeprune.prune.program import Program

MARGIN = 0.05  # a triple must be faster than its convolution by this share
HELD = 0.5  # of what the table says they save together, timed whole
GAIN = 0.02  # the share by which the whole plan must hurt less
NOISE = 1e-6  # damage below it is none
RANKS = 8  # of each side
TRIED = 4  # offers of a layer whose damage is measured
IMAGES = 256
TRIES = 3  # of the whole choice, its better half, and the better half of that
NEXT = (1.05, 1.1, 1.2)  # budgets beside the asked one, for the price at the margin


class Prices(GridPrices, Protocol):
    """What factoring needs of the target beside (pipeline/pricing.py)."""

    def renew(self, anatomy: Anatomy) -> None:
        """Let the next network prepared at this one's input shape decide the candidates."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A layer at these ranks (None: that side as it is): predicted ms of its kernel, and of those in its place."""

    layer: str
    inputs: int | None
    outputs: int | None
    before_ms: float
    after_ms: float

    @property
    def saved_ms(self) -> float:
        return self.before_ms - self.after_ms


@dataclass(frozen=True, slots=True)
class Chosen:
    factoring: Factoring
    triple: Triple
    saved_ms: float
    damage: float


@dataclass(frozen=True, slots=True)
class Begun:
    """The network that the rounds start from, its measured ms, what was factored, and what to say about it."""

    network: Network
    measured_ms: float
    factored: tuple[Factoring, ...]
    notes: tuple[str, ...]


def begin(
    start: Network,
    start_ms: float,
    original_ms: float,
    budget_ms: float,
    prices: Prices,
    judge_of: Callable[[Network | None], Judging],
    batches: Sequence[torch.Tensor],
    choose: lowrank.Choose,
    clock: Callable[[Network], float],
    progress: Callable[[float, float, str], None],
    removes_blocks: bool = True,
) -> Begun:
    """Factor what is worth it, or nothing.

    judge_of: what judges and repairs cuts of a factored network, or of the original (None)
    batches:  calibration inputs; without any, damage is measured on noise and combinations are fitted to the weights
    choose:   the kernel that orders filters and slices
    The rest as for ``shrink``. Raises BudgetUnreachableError where the original cannot reach the budget.
    """
    anatomy = dissect(start, prices.fusion)
    candidates = prices.prepare(anatomy)
    correction = start_ms / predicted_ms(anatomy, prices)
    refuse_unreachable(anatomy, candidates, prices, correction, original_ms, budget_ms, removes_blocks)

    def nothing(why: str) -> Begun:
        return Begun(start, start_ms, (), (f"--lowrank: nothing was factored: {why}",))

    progress(0.0, 1.0, "pricing factored layers")
    found = offers(anatomy, prices)
    if not found:
        return nothing("no triple of kernels is faster than its convolution on this target")
    problem = _problem(start, judge_of(None), anatomy, candidates, prices, removes_blocks)[0]
    planned = _planned(problem, AIM * budget_ms / correction)
    if planned[1] <= NOISE:
        return nothing("the budget can be met by narrowing at no damage")
    price = _price(problem, planned)
    chosen, cheapest = choices(start, found, price, batches, choose, progress)
    if not chosen:
        return nothing(
            f"{len(found)} triples in {len({o.layer for o in found})} layers are faster, the cheapest at a damage of "
            f"{cheapest:.3g} per ms, and narrowing costs {price:.3g} per ms"
        )
    why = ""
    for _ in range(TRIES):
        network = insert(start, {c.factoring.layer: c.triple for c in chosen})
        network = judge_of(network).repair(State(network))
        measured_ms = clock(network)
        foretold_ms = correction * sum(c.saved_ms for c in chosen)
        if measured_ms > start_ms - HELD * foretold_ms:
            why = f"{len(chosen)} layers factored take {100 * measured_ms / start_ms:.1f}% of the time, timed whole"
        else:
            view = dissect(network, prices.fusion)
            prices.renew(view)
            judge = judge_of(network)
            there, damage = _problem(network, judge, view, prices.prepare(view), prices, removes_blocks)
            damage += _planned(there, AIM * budget_ms * predicted_ms(view, prices) / measured_ms)[1]
            if damage < planned[1] * (1 - GAIN):
                return Begun(network, measured_ms, tuple(c.factoring for c in chosen), ())
            why = f"with {len(chosen)} layers factored the plan's damage is {damage:.3g}, without {planned[1]:.3g}"
        chosen = sorted(chosen, key=lambda c: c.damage / c.saved_ms)[: max(1, len(chosen) // 2)]
    prices.renew(anatomy)
    return nothing(why)


def offers(anatomy: Anatomy, prices: Prices) -> list[Offer]:
    """All triples that are faster than their convolution by a margin; what the table lacks is measured."""
    start = anatomy.network
    layers = factorable(start)
    block = (prices.fusion.block if prices.fusion else None) or 1
    places = {span.site.output: span for span in anatomy.spans}
    wanted: list[tuple[str, tuple[int | None, int | None], Kernel, list[Kernel]]] = []
    for sides in ((True, False), (False, True), (True, True)):
        full = [Factoring(path, *_all(start, path, sides)) for path in layers]
        view = dissect(factored(start, full), prices.fusion)
        made = {slot.target: i for i, g in enumerate(view.channels.groups) for slot in g.slots if slot.role == "out"}
        for f in full:
            paths = inner_layers(view.network, f)
            assert paths is not None
            inner = [
                made.get(paths[role]) if wants else None for role, wants in zip(("in", "core"), sides, strict=True)
            ]
            groups = [g for g in inner if g is not None]
            mine = [s for s in view.spans if any(g in groups for axis in s.variables for g, _ in axis.terms)]
            before = next((places[s.site.output] for s in reversed(mine) if s.site.output in places), None)
            if len(groups) < sum(sides) or len(mine) != 1 + sum(sides) or before is None:
                continue
            sizes = {i: g.size for i, g in enumerate(view.channels.groups)}
            ranks = [_ranks(sizes[g], block, RANKS // sum(sides)) if g is not None else [None] for g in inner]
            for pair in itertools.product(*ranks):
                widths = sizes | {g: r for g, r in zip(inner, pair, strict=True) if g is not None and r is not None}
                kernels = [span.at(tuple(axis.at(widths) for axis in span.variables)) for span in mine]
                wanted.append((f.layer, (pair[0], pair[1]), before.at(before.full), kernels))
    prices.stand_in(anatomy, [kernel for _, _, before, after in wanted for kernel in (before, *after)])
    result = []
    for layer, ranks_, before_kernel, kernels in wanted:
        try:
            before_ms, after_ms = prices.kernel_ms(before_kernel), math.fsum(map(prices.kernel_ms, kernels))
        except TableError:
            continue  # the target could not run one of them
        if after_ms < (1 - MARGIN) * before_ms:
            result.append(Offer(layer, *ranks_, before_ms, after_ms))
    return result


def choices(
    start: Network,
    found: Sequence[Offer],
    price: float,
    batches: Sequence[torch.Tensor],
    choose: lowrank.Choose,
    progress: Callable[[float, float, str], None],
) -> tuple[list[Chosen], float]:
    """(for each layer the offer that gains most where damage costs ``price`` per ms, least damage per ms of all)."""
    layers = list(dict.fromkeys(offer.layer for offer in found))
    inputs: Sequence[Any] = batches or [start.random_inputs(IMAGES // 4)]
    judge = OutputJudge(start, start, inputs, images=IMAGES, trials=TRIED * len(layers))
    calls = start.modules_called()
    program = Program(start)
    chosen, cheapest = [], math.inf
    for number, path in enumerate(layers):
        progress(number, len(layers), "judging factored layers")
        layer = lowrank.observe(program, program.by_name[calls[path][0].name], judge if batches else None)
        orders = lowrank.select(layer, choose)
        mine = [o for o in found if o.layer == path]
        best: tuple[float, Chosen] | None = None
        for offer, factoring, triple in _frontier(layer, mine, orders):
            damage = lowrank.damage(judge, path, layer, triple)
            cheapest = min(cheapest, damage / offer.saved_ms)
            gain = price * offer.saved_ms - max(damage, NOISE)
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, Chosen(factoring, triple, offer.saved_ms, damage)
        if best is not None:
            chosen.append(best[1])
    return chosen, cheapest


def _frontier(
    layer: lowrank.Layer, mine: Sequence[Offer], orders: tuple[Sequence[int], Sequence[int]]
) -> list[tuple[Offer, Factoring, Triple]]:
    """Of a layer's offers those of which no faster one gives nearer outputs; a few, evenly spaced."""
    kept: list[tuple[Offer, Factoring, Triple]] = []
    nearest = math.inf
    for offer in sorted(mine, key=lambda o: o.after_ms):
        sides = (
            None if rank is None else tuple(sorted(order[:rank]))
            for rank, order in zip((offer.inputs, offer.outputs), orders, strict=True)
        )
        factoring = Factoring(offer.layer, *sides)
        triple = lowrank.fit(layer, factoring)
        error = lowrank.error(layer, triple)
        if error < nearest:
            kept.append((offer, factoring, triple))
            nearest = error
    picks = np.unique(np.linspace(0, len(kept) - 1, TRIED).round().astype(int))
    return [kept[i] for i in picks]


def _all(network: Network, path: str, sides: tuple[bool, bool]) -> tuple[tuple[int, ...] | None, ...]:
    leaf: Any = network.module.get_submodule(path)
    full = zip((leaf.in_channels, leaf.out_channels), sides, strict=True)
    return tuple(tuple(range(count)) if side else None for count, side in full)


def _ranks(size: int, block: int, limit: int) -> list[int]:
    """Whole blocks below ``size``, thinned out evenly."""
    every = list(range(block, size, block))
    if not every:
        return []
    return [every[i] for i in np.unique(np.linspace(0, len(every) - 1, limit).round().astype(int))]


def _problem(
    network: Network,
    judge: Judging,
    anatomy: Anatomy,
    candidates: Sequence[Widths],
    prices: Prices,
    removes_blocks: bool,
) -> tuple[Problem, float]:
    """(what the planner would be asked now, the damage that was done before)."""
    judgement = judge.judge(State(network), anatomy, candidates)
    if not removes_blocks:
        judgement = replace(judgement, block_damage={})
    return problem_of(anatomy, candidates, prices, judgement), judgement.divergence


def _planned(problem: Problem, budget_ms: float) -> tuple[float, float]:
    """(ms, damage) of the exact plan; infinite damage where there is none."""
    try:
        plan = exact(problem, None)(budget_ms)
    except BudgetUnreachableError:
        return budget_ms, math.inf
    return evaluate(problem, plan.widths, plan.removed)


def _price(problem: Problem, planned: tuple[float, float]) -> float:
    """Damage per ms at the margin of a plan: what the next milliseconds given back would spare."""
    ms, damage = planned
    whole_ms = evaluate(problem, {})[0]
    for factor in NEXT:
        other_ms, other = _planned(problem, min(ms * factor, whole_ms))
        if other_ms > ms and other < damage:
            return (damage - other) / (other_ms - ms)
    return damage / (whole_ms - ms) if whole_ms > ms else math.inf
