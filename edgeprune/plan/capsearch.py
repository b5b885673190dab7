"""CaP's structural search: one tolerance for all layers, found by bisection, and no layer more than a step at a time.

Source: Xie et al. (2021): the widths of a network follow from the information that each layer may lose, by binary
search under a step constraint.
In a pass every group takes the fewest units, among those within a step, at which the layers reading it lose no more
than the tolerance (itself found by bisection: the loss falls with the width). Then the losses are measured again on the
network as it is, until nothing moves. The tolerance is bisected until the network lies just within the budget.
Deviations: the source names the search and not its details; the loss is the relative error of the reading layers'
outputs with their best weights (the root of the share that CaP's loss is); counts are candidate widths, stairs of the
measured latency, the next one always within a step; a group that would save no time stays. Blocks are kept.
"""

from __future__ import annotations

import math

from edgeprune.errors import BudgetUnreachableError, UsageError
from edgeprune.plan.descent import Descent
from edgeprune.plan.exact import SLACK
from edgeprune.plan.problem import Move, Plan, Plans, Problem, Trials

STEP = 0.25  # of a group's full size, per pass
CLOSE = 1.02  # two tolerances nearer to each other than this factor are one
ENOUGH = 0.99  # of the budget used: then no smaller tolerance is looked for
LEAST, MOST = 1e-6, 100.0  # up to the one nothing is lost, from the other on anything may be

State = tuple[int, ...]


def cap_search(problem: Problem, trials: Trials | None) -> Plans:
    """The planner. Raises UsageError without trials."""
    if trials is None:
        raise UsageError("planner cap measures what layers lose on images; give --data, or use --planner exact")
    return CapSearch(problem, trials).plan


class CapSearch:
    """Remembers every tolerance and every loss it looked at, for the next budget."""

    def __init__(self, problem: Problem, trials: Trials, step: float = STEP) -> None:
        self.problem, self.trials, self.step = problem, trials, step
        self.plans: dict[float, Plan] = {0.0: Descent(problem).plan()}
        self.losses: dict[tuple[State, Move], float] = {}

    def plan(self, budget_ms: float) -> Plan:
        """The plan of the least tolerance within the budget, to CLOSE or ENOUGH. Raises BudgetUnreachableError."""
        while True:
            within = [t for t, plan in self.plans.items() if _ms(plan) <= budget_ms * (1 + SLACK)]
            high = min(within, default=math.inf)
            low = max((t for t in self.plans if t < high), default=0.0)
            used = within and _ms(self.plans[high]) >= ENOUGH * budget_ms
            if used or (within and (high <= LEAST or (low and high / low < CLOSE))):
                return self.plans[high]
            if within:
                asked = math.sqrt(low * high) if low else max(high / 4, LEAST)
            elif low < MOST:
                asked = min(4 * low, MOST) if low else self._typical()
            else:
                raise BudgetUnreachableError(
                    f"planner cap does not reach {budget_ms:.6g} ms: with all groups as narrow as saves time and all "
                    f"blocks kept, {_ms(self.plans[low]):.6g} ms are left; ask for more, or use --planner exact"
                )
            self.plans[asked] = self.at(asked)

    def _typical(self) -> float:
        """The median loss of all first moves."""
        self.trials.restart()
        state = Descent(self.problem)
        losses = sorted(self._loss(state, move) for move in state.moves() if move.width is not None)
        return min(max(losses[len(losses) // 2], LEAST), MOST) if losses else MOST

    def at(self, tolerance: float) -> Plan:
        """The plan that a tolerance leads to."""
        tolerance = math.inf if tolerance >= MOST else tolerance
        self.trials.restart()
        state = Descent(self.problem)
        while moves := self._pass(state, tolerance):
            state.take(*moves)
            self.trials.accept(*moves)
        return state.plan()

    def _pass(self, state: Descent, tolerance: float) -> list[Move]:
        moves = []
        for i, group in enumerate(self.problem.groups):
            reach = state.widths[i] - self.step * group.widths[-1]
            narrower = state.narrower(i)
            widths = [w for n, w in enumerate(narrower) if n == 0 or w >= reach]
            low, high = 0, len(widths)  # so many candidates are narrow enough at least, and at most
            while low < high:
                middle = (low + high) // 2
                if self._loss(state, Move(group.name, widths[middle])) <= tolerance:
                    low = middle + 1
                else:
                    high = middle
            if low and state.saving(move := Move(group.name, widths[low - 1])) > SLACK * state.latency_ms:
                moves.append(move)
        return moves

    def _loss(self, state: Descent, move: Move) -> float:
        key = (tuple(state.widths.values()), move)
        if key not in self.losses:
            self.losses[key] = self.trials.layer_error(move)
        return self.losses[key]


def _ms(plan: Plan) -> float:
    assert plan.predicted_ms is not None
    return plan.predicted_ms
