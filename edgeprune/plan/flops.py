"""The exact planner with multiply-adds in the place of milliseconds: what planning on FLOPs gives. A baseline.

Source: FLOPs-constrained pruning in general; the planner is that of plan/exact.py.
Deviations: a budget in ms is read as the same share of the whole network's multiply-adds as it is of its latency;
``Plan.predicted_ms`` is that view's own prediction (the plan's share of the multiply-adds, in ms), so that whoever
measures the plan can correct what is asked by it. ``Plan.gap`` is None: the proof is not about latency.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune.errors import BudgetUnreachableError, TableError
from edgeprune.plan.exact import SLACK, evaluate, exact, smallest
from edgeprune.plan.problem import Plan, Plans, Problem, Trials


def flops(problem: Problem, trials: Trials | None = None) -> Plans:
    """The planner; nothing is tried. Raises TableError for a term without multiply-adds."""
    for term in problem.terms:
        if term.macs.keys() != term.latency_ms.keys():
            raise TableError(f"term {term.name} has no multiply-adds for its channel counts; use another --planner")
    counted = replace(problem, terms=tuple(replace(term, latency_ms=term.macs) for term in problem.terms))
    ms_per_mac = evaluate(problem, {})[0] / max(evaluate(counted, {})[0], 1.0)
    least_ms = smallest(counted) * ms_per_mac
    plans = exact(counted)

    def plan(budget_ms: float) -> Plan:
        if least_ms > budget_ms * (1 + SLACK):
            raise BudgetUnreachableError(
                f"planner flops does not reach {budget_ms:.6g} ms: its smallest network has the multiply-adds of "
                f"{least_ms:.6g} ms; ask for that or more, or use --planner exact"
            )
        found = plans(budget_ms / ms_per_mac)
        return replace(found, predicted_ms=float(found.predicted_ms or 0.0) * ms_per_mac, gap=None)

    return plan
