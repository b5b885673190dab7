import pytest

from edgeprune.errors import BudgetMissedError, BudgetUnreachableError
from edgeprune.pipeline.fit import fit
from edgeprune.plan.problem import Plan


def planner(step=1):
    """Plans one group whose predicted latency is its width, in steps."""

    def solve(asked_ms):
        width = int(asked_ms // step) * step
        return Plan({"a": width}, predicted_ms=float(width), damage=1.0 - width / 1000)

    return solve


@pytest.mark.parametrize("factor", [0.5, 0.8, 0.97, 1.0, 1.3, 2.0])
def test_a_wrong_prediction_is_corrected_until_the_budget_is_used(factor):
    fitted = fit(planner(), lambda plan: plan.widths["a"] * factor + 20, budget_ms=400.0)
    assert 0.97 * 400 <= fitted.measured_ms <= 400
    assert len(fitted.attempts) <= 5


def test_coarse_plans_end_at_the_largest_that_fits():
    fitted = fit(planner(step=100), lambda plan: plan.widths["a"] * 1.1, budget_ms=400.0)
    assert fitted.plan.widths["a"] == 300


def test_the_least_damaging_plan_within_the_budget_wins():
    noise = iter([1.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    fitted = fit(planner(), lambda plan: plan.widths["a"] * next(noise), budget_ms=100.0)
    inside = [a for a in fitted.attempts if a.measured_ms <= 100]
    assert fitted.plan.damage == min(a.plan.damage for a in inside)


def test_a_budget_that_no_attempt_meets_is_an_error():
    with pytest.raises(BudgetMissedError, match="above the budget"):
        fit(planner(), lambda plan: 500.0, budget_ms=400.0)


def test_a_plan_that_cannot_go_lower_keeps_what_was_found():
    solve = planner()

    def bounded(asked_ms):
        if asked_ms < 395:
            raise BudgetUnreachableError("no plan reaches that")
        return solve(asked_ms)

    fitted = fit(bounded, lambda plan: plan.widths["a"] * 0.9, budget_ms=400.0)
    assert fitted.measured_ms <= 400
    with pytest.raises(BudgetMissedError):
        fit(bounded, lambda plan: plan.widths["a"] * 1.2, budget_ms=400.0)
