"""Measure before you train: plan, build, time whole on the target, correct the prediction, plan again.

Latency does not depend on the weights, so this takes seconds and nothing is lost when the first plan misses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.errors import BudgetMissedError, BudgetUnreachableError
from edgeprune.plan.problem import Plan

ENOUGH = 0.97  # of the budget used: then no more attempts
AIM = 0.985  # the measured share of the budget each attempt aims at


@dataclass(frozen=True, slots=True)
class Attempt:
    plan: Plan
    asked_ms: float  # the budget the planner was given, in predicted milliseconds
    measured_ms: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """The plan with the least damage among those measured within the budget, and all attempts in order."""

    plan: Plan
    measured_ms: float
    attempts: tuple[Attempt, ...]


def fit(
    solve: Callable[[float], Plan],
    measure: Callable[[Plan], float],
    budget_ms: float,
    *,
    correction: float = 1.0,
    max_attempts: int = 8,
) -> Fitted:
    """Find a plan whose *measured* latency lies just under ``budget_ms``.

    solve:      predicted budget in ms -> the best plan within it
    measure:    plan -> milliseconds of the network built by it, timed whole on the target
    correction: measured / predicted as known so far

    Raises BudgetUnreachableError (from ``solve``), BudgetMissedError when no attempt measured within the budget.
    """
    attempts: list[Attempt] = []
    below, above = 0.0, float("inf")  # predicted budgets known to end within, and beyond, the budget
    asked = AIM * budget_ms / correction
    seen: dict[tuple[object, ...], float] = {}
    for _ in range(max_attempts):
        try:
            plan = solve(asked)
        except BudgetUnreachableError:
            if attempts:
                break
            asked = budget_ms / correction
            plan = solve(asked)
        key = (tuple(sorted(plan.widths.items())), tuple(sorted(plan.removed)))
        measured = seen[key] if key in seen else measure(plan)
        repeated = key in seen
        seen[key] = measured
        attempts.append(Attempt(plan, asked, measured))
        if measured <= budget_ms:
            below = max(below, asked)
        else:
            above = min(above, asked)
        if measured <= budget_ms and (measured >= ENOUGH * budget_ms or (repeated and above / below < 1.02)):
            break
        predicted = plan.predicted_ms or asked
        asked = AIM * budget_ms * predicted / measured
        if repeated and measured <= budget_ms:
            asked = max(asked, below * 1.01)
        if not below < asked < above:
            asked = (below + above) / 2 if above < float("inf") and below else (below * 1.03 or above * 0.95)
    within = [a for a in attempts if a.measured_ms <= budget_ms]
    if not within:
        best = min(a.measured_ms for a in attempts)
        raise BudgetMissedError(
            f"after {len(attempts)} plans the fastest network measured {best:.4g} ms, above the budget of "
            f"{budget_ms:.4g} ms; the machine may be busy: try again, or ask for a larger --latency"
        )
    best_attempt = min(within, key=lambda a: (a.plan.damage or 0.0, -a.measured_ms))
    return Fitted(best_attempt.plan, best_attempt.measured_ms, tuple(attempts))
