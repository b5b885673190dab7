"""From the original to a network whose measured latency is within the budget, in rounds.

Damage is additive only while it is small. So the way down is taken in rounds: judge, plan to an intermediate budget,
cut, repair, and judge what is left against the *original's* outputs. The last round plans, times the result whole, and
corrects, until the measurement lies just under the budget (pipeline/fit.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgeprune.device.target import Fusion
from edgeprune.errors import BudgetUnreachableError
from edgeprune.graph.network import Network
from edgeprune.latency.kernel import Kernel
from edgeprune.pipeline.apply import State, advance
from edgeprune.pipeline.fit import Attempt, fit
from edgeprune.pipeline.problem import Widths, build_problem
from edgeprune.pipeline.spans import Anatomy, dissect
from edgeprune.plan.exact import evaluate, exact, smallest
from edgeprune.plan.problem import Plan, Planner, Problem, Ranking, Recipe, Trials
from edgeprune.train.config import History

ROUND_SHARE = 0.85  # a round leaves at least about this share of the latency it starts with


class Prices(Protocol):
    """What latency costs on the target (pipeline/pricing.py)."""

    fusion: Fusion

    def prepare(self, anatomy: Anatomy) -> Sequence[Widths]:
        """Measure what is missing; the candidate widths of every group."""

    def kernel_ms(self, kernel: Kernel) -> float: ...

    def constant_ms(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """What can be cut and what it costs: a ranking per group name, a damage per block name, and trials of moves on the
    judged network where it can be tried at all. ``divergence``: the damage that was done before."""

    rankings: Mapping[str, Ranking]
    block_damage: Mapping[str, float]
    trials: Trials | None = None
    divergence: float = 0.0


@dataclass(frozen=True, slots=True)
class Shrunk:
    """recipe: what was done to the original. network: cut, repaired, not yet trained; its latency as the table predicts
    it, told as a share of the original's (the machine's drift is in neither), and as measured, in ms. learning: the
    training by which a learner decided. notes: what factoring has to say."""

    recipe: Recipe
    network: Network
    predicted_share: float
    measured_ms: float
    rounds: int
    attempts: tuple[Attempt, ...]
    learning: History | None = None
    notes: tuple[str, ...] = ()


def shrink(
    original: Network,
    original_ms: float,
    budget_ms: float,
    prices: Prices,
    judge: Callable[[State, Anatomy, Sequence[Widths]], Judgement],
    repair: Callable[[State], Network],
    clock: Callable[[Network], float],
    progress: Callable[[float, float, str], None],
    planner: Planner = exact,
    removes_blocks: bool = True,
    start_ms: float | None = None,
    rounds: int | None = None,
) -> Shrunk:
    """Cut ``original`` until ``clock`` (ms of a network timed whole) is within ``budget_ms``.

    judge:  (what was done so far, anatomy and candidates of its network) -> Judgement against the original's outputs
    repair: what was done so far -> its network with weights refitted to the original's responses
    planner: decides how much of everything, once in every round; every attempt of the last one asks the same plans
    removes_blocks: whether the planner does
    start_ms: of ``original`` where that is not what ``original_ms`` was measured of: at a smaller input
    rounds: how many (default: by how far it is)
    Raises BudgetUnreachableError before any other work, BudgetMissedError when no plan measures within the budget.
    """
    anatomy = dissect(original, prices.fusion)
    candidates = prices.prepare(anatomy)
    start_ms = original_ms if start_ms is None else start_ms
    correction = start_ms / predicted_ms(anatomy, prices)
    refuse_unreachable(anatomy, candidates, prices, correction, original_ms, budget_ms, removes_blocks)
    rounds = rounds or max(1, math.ceil(math.log(budget_ms / start_ms) / math.log(ROUND_SHARE) - 0.2))
    state = State(original)
    for step in range(1, rounds):
        progress(step - 1, rounds, f"round {step} of {rounds}: planning")
        judgement = judge(state, anatomy, candidates)
        target_ms = start_ms * (budget_ms / start_ms) ** (step / rounds) / correction
        plan = planner(problem_of(anatomy, candidates, prices, judgement), judgement.trials)(target_ms)
        state = advance(state, plan, judgement.rankings)
        state = replace(state, network=repair(state))
        anatomy = dissect(state.network, prices.fusion)
        candidates = prices.prepare(anatomy)
    progress(rounds - 1, rounds, f"round {rounds} of {rounds}: planning")
    judgement = judge(state, anatomy, candidates)
    problem = problem_of(anatomy, candidates, prices, judgement)

    def measure(plan: Plan) -> float:
        progress(0.0, 1.0, "timing a plan")
        return clock(advance(state, plan, judgement.rankings).network)

    fitted = fit(planner(problem, judgement.trials), measure, budget_ms, correction=correction)
    state = advance(state, fitted.plan, judgement.rankings)
    return Shrunk(
        state.recipe,
        repair(state),
        evaluate(problem, fitted.plan.widths, fitted.plan.removed)[0] * correction / original_ms,
        fitted.measured_ms,
        rounds,
        fitted.attempts,
    )


def uncut(network: Network, original_ms: float, measured_ms: float) -> Shrunk:
    """A network that is within the budget as it is, at a smaller input."""
    return Shrunk(Recipe(()), network.copy(), measured_ms / original_ms, measured_ms, 0, ())


def predicted_ms(anatomy: Anatomy, prices: Prices) -> float:
    """The table's latency of a network as it is."""
    return prices.constant_ms() + math.fsum(prices.kernel_ms(span.at(span.full)) for span in anatomy.spans)


def problem_of(anatomy: Anatomy, candidates: Sequence[Widths], prices: Prices, judgement: Judgement) -> Problem:
    """What a planner is asked, priced; without a budget."""
    return build_problem(
        anatomy,
        candidates,
        prices.kernel_ms,
        prices.constant_ms(),
        judgement.rankings,
        judgement.block_damage,
    )


def refuse_unreachable(
    anatomy: Anatomy,
    candidates: Sequence[Widths],
    prices: Prices,
    correction: float,
    original_ms: float,
    budget_ms: float,
    removes_blocks: bool,
) -> None:
    """Raise BudgetUnreachableError when no plan over the candidates can be fast enough."""
    free = {g.name: Ranking.free(g.size) for g in anatomy.channels.groups}
    nothing = Judgement(free, {b.name: 0.0 for b in anatomy.blocks if removes_blocks})
    floor_ms = smallest(problem_of(anatomy, candidates, prices, nothing)) * correction
    if floor_ms > budget_ms:
        share = 100 * floor_ms / original_ms
        raise BudgetUnreachableError(
            f"no plan reaches {budget_ms:.4g} ms: all blocks {'removed' if removes_blocks else 'kept'} and all groups "
            f"at their narrowest, the network still takes {floor_ms:.4g} ms ({share:.0f}% of {original_ms:.4g} ms); "
            f"ask for --latency {math.ceil(share) + 1}% or more"
            + ("" if removes_blocks else ", or use --planner exact, which removes blocks")
        )
