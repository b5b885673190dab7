"""One share for all groups: the plan of those who measure nothing. A baseline.

Source: uniform width scaling, as the width multiplier of MobileNet (Howard et al., 2017) and the uniform baselines of
filter pruning.
Deviations: the share of a group is snapped to the nearest candidate width (the wider of two), and the largest share
whose plan lies within the *measured* budget is taken. Blocks are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgeprune.plan.descent import Descent, unreachable
from edgeprune.plan.exact import SLACK
from edgeprune.plan.problem import Move, Plan, Plans, Problem, Trials


def uniform(problem: Problem, trials: Trials | None = None) -> Plans:
    """The planner; nothing is tried."""
    steps = [(float(plan.predicted_ms or 0.0), plan) for plan in _shares(problem)]

    def plan(budget_ms: float) -> Plan:
        for ms, step in steps:
            if ms <= budget_ms * (1 + SLACK):
                return step
        raise unreachable("uniform", budget_ms, min(ms for ms, _ in steps))

    return plan


def _shares(problem: Problem) -> Iterator[Plan]:
    """One plan for every share that gives another one, falling."""
    turns: dict[float, list[Move]] = {}  # just below this share these groups take these widths
    for group in problem.groups:
        size = group.widths[-1]
        for narrow, wide in zip(group.widths, group.widths[1:], strict=False):
            turns.setdefault((narrow + wide) / (2 * size), []).append(Move(group.name, narrow))
    state = Descent(problem)
    yield state.plan()
    for share in sorted(turns, reverse=True):
        state.take(*turns[share])
        yield state.plan()
