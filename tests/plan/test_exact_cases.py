"""Single properties of the planner, each on a problem small enough to read."""

import itertools

import numpy as np
import pytest

from edgeprune.errors import BudgetUnreachableError, TableError, UsageError
from edgeprune.plan import eliminate
from edgeprune.plan.exact import evaluate, smallest, solve
from edgeprune.plan.problem import Axis, BlockChoice, GroupChoice, Problem, Term

A = Axis(((0, 1),))
B = Axis(((1, 1),))


@pytest.fixture(params=[eliminate.MAX_CELLS, 0], ids=["elimination", "programme"])
def _way(request, monkeypatch):
    monkeypatch.setattr(eliminate, "MAX_CELLS", request.param)


def one_group(budget_ms, damage=(0.5, 0.2, 0.0), latency=(1.0, 2.0, 4.0)):
    group = GroupChoice("a", (8, 16, 32), damage)
    table = {(w,): ms for w, ms in zip(group.widths, latency, strict=True)}
    return Problem((group,), (), (Term("conv", (A,), table), Term("rest", (), {(): 0.5})), budget_ms)


@pytest.mark.usefixtures("_way")
class TestBothWays:
    def test_one_group(self):
        plan = solve(one_group(3.0))
        assert plan.widths == {"a": 16}
        assert plan.predicted_ms == 2.5
        assert plan.damage == 0.2
        assert plan.gap is not None
        assert plan.gap <= 5e-4

    def test_budget_exactly_at_a_point(self):
        assert solve(one_group(2.5)).widths == {"a": 16}
        assert solve(one_group(1.5)).widths == {"a": 8}
        assert solve(one_group(np.nextafter(2.5, 0))).widths == {"a": 16}  # rounding of a sum, no excess
        assert solve(one_group(2.4999)).widths == {"a": 8}

    def test_unreachable_budget_names_the_smallest_latency(self):
        assert smallest(one_group(1.0)) == 1.5
        with pytest.raises(BudgetUnreachableError, match=r"1\.5 ms"):
            solve(one_group(1.49))

    def test_everything_fits(self):
        plan = solve(one_group(10.0))
        assert plan.widths == {"a": 32}
        assert (plan.damage, plan.gap) == (0.0, 0.0)

    def test_smallest_where_less_is_slower(self):
        assert smallest(one_group(1.0, latency=(3.0, 2.0, 4.0))) == 2.5

    def test_cliff_is_stepped_over(self):
        """The middle width is slower than the full one: no plan stays there."""
        plan = solve(one_group(4.5, latency=(1.0, 5.0, 4.0)))
        assert plan.widths == {"a": 32}

    def test_zero_damage_keeps_the_widest_at_no_cost(self):
        plan = solve(one_group(3.0, damage=(0.0, 0.0, 0.0), latency=(2.0, 2.0, 4.0)))
        assert plan.widths == {"a": 16}
        assert (plan.damage, plan.gap) == (0.0, 0.0)

    def test_blocks_only(self):
        """A knapsack: greedy by damage per ms would remove the first two blocks, the last one alone hurts less."""
        saved, hurt = (3.0, 3.0, 4.0), (1.0, 1.0, 1.5)
        blocks = tuple(BlockChoice(f"b{i}", d) for i, d in enumerate(hurt))
        terms = tuple(Term(f"t{i}", (), {(): ms}, i) for i, ms in enumerate(saved))
        plan = solve(Problem((), blocks, terms, 6.0))
        assert plan.removed == ("b2",)
        assert plan.predicted_ms == 6.0
        assert plan.damage == 1.5

    def test_groups_of_a_removed_block_cost_nothing_and_are_not_named(self):
        groups = (GroupChoice("trunk", (8, 16), (1.0, 0.0)), GroupChoice("inner", (4, 8), (0.2, 0.0), block=0))
        branch = {(t, i): 0.1 * t + 0.1 * i for t, i in itertools.product((8, 16), (4, 8))}
        trunk = {(t,): 0.1 * t for t in (8, 16)}
        terms = (Term("stem", (A,), trunk), Term("in", (A, B), branch, 0), Term("out", (A, B), branch, 0))
        problem = Problem(groups, (BlockChoice("block", 0.3),), terms, 2.0)
        plan = solve(problem)
        assert plan.widths == {"trunk": 16}
        assert plan.removed == ("block",)
        assert (plan.predicted_ms, plan.damage) == (1.6, 0.3)
        assert evaluate(problem, {"trunk": 16, "inner": 4}, ("block",)) == (1.6, 0.3)
        roomy = Problem(groups, problem.blocks, terms, 6.0)
        assert solve(roomy).removed == ()
        assert solve(roomy).widths == {"trunk": 16, "inner": 4}

    def test_damages_over_many_orders_of_magnitude(self):
        """The cheap choices still count next to damages a hundred million times as large."""
        groups = tuple(GroupChoice(f"g{i}", (1, 2, 3), (1.0, 1e-8 * (i + 1), 0.0)) for i in range(4))
        terms = tuple(Term(f"t{i}", (Axis(((i, 1),)),), {(1,): 1.0, (2,): 2.0, (3,): 3.0}) for i in range(4))
        plan = solve(Problem(groups, (), terms, 10.0), gap=0.0)
        assert plan.widths == {"g0": 2, "g1": 2, "g2": 3, "g3": 3}
        assert plan.damage == pytest.approx(3e-8, rel=1e-12)

    def test_a_sum_of_groups_is_priced_as_one_axis(self):
        """Concatenation: 8 + 8 channels end on a stair, 8 + 16 do not."""
        groups = tuple(GroupChoice(n, (8, 16), (0.1, 0.0)) for n in "ab")
        both = Axis(((0, 1), (1, 1)))
        term = Term("conv", (both,), {(16,): 1.0, (24,): 5.0, (32,): 2.0})
        assert solve(Problem(groups, (), (term,), 2.0)).widths == {"a": 16, "b": 16}
        assert solve(Problem(groups, (), (term,), 1.9)).widths == {"a": 8, "b": 8}


def test_no_time_still_gives_a_plan_and_an_honest_gap():
    rng = np.random.default_rng(0)
    groups = tuple(GroupChoice(f"g{i}", tuple(range(1, 9)), tuple(np.linspace(1, 0, 8))) for i in range(6))
    tables = [{(u, v): float(rng.uniform(1, 2) + u * v) for u in range(1, 9) for v in range(1, 9)} for _ in range(5)]
    terms = tuple(Term(f"t{i}", (Axis(((i, 1),)), Axis(((i + 1, 1),))), t) for i, t in enumerate(tables))
    problem = Problem(groups, (), terms, 100.0)
    hasty, proven = solve(problem, time_limit_s=0.0), solve(problem)
    assert hasty.gap is not None
    assert proven.gap is not None
    assert hasty.damage is not None
    assert proven.damage is not None
    assert hasty.predicted_ms is not None
    assert hasty.predicted_ms <= 100.0
    assert proven.gap <= 5e-4 < hasty.gap
    assert proven.damage <= hasty.damage
    assert hasty.damage * (1 - hasty.gap) <= proven.damage


def test_missing_latency_is_refused_by_name():
    groups = (GroupChoice("a", (8, 16), (0.1, 0.0)), GroupChoice("b", (8, 16), (0.1, 0.0)))
    table = {(8, 8): 1.0, (8, 16): 1.0, (16, 8): 1.0}
    problem = Problem(groups, (), (Term("layer1.conv", (A, B), table),), 1.0)
    with pytest.raises(TableError, match=r"layer1\.conv .*\(16, 16\)"):
        solve(problem)
    with pytest.raises(TableError, match=r"layer1\.conv"):
        evaluate(problem, {})
    # the same table is complete when (16, 16) cannot happen
    sums = Problem(groups[:1], (), (Term("t", (A, Axis(((0, -1),), 24)), table | {(16, 8): 0.5}),), 1.0)
    assert solve(sums).predicted_ms == 0.5


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem((GroupChoice("a", (8, 4), (0.0, 0.0)),), (), (), 1.0), "ascending"),
        (Problem((GroupChoice("a", (4, 8), (0.0,)),), (), (), 1.0), "1 damages"),
        (Problem((GroupChoice("a", (4,), (float("nan"),)),), (), (), 1.0), "finite"),
        (Problem((), (BlockChoice("b", -1.0),), (), 1.0), "not negative"),
        (Problem((), (), (), float("nan")), "budget"),
        (
            Problem((GroupChoice("a", (4,), (0.0,), 0),), (BlockChoice("b", 0.0),), (Term("t", (A,), {(4,): 1.0}),), 1),
            "does not lie in that block",
        ),
    ],
)
def test_meaningless_problems_are_refused(problem, message):
    with pytest.raises(UsageError, match=message):
        solve(problem)


def test_evaluate_refuses_what_does_not_exist():
    with pytest.raises(UsageError, match="no candidate"):
        evaluate(one_group(1.0), {"a": 9})
    with pytest.raises(UsageError, match="nobody"):
        evaluate(one_group(1.0), {"nobody": 9})
    with pytest.raises(UsageError, match="gone"):
        evaluate(one_group(1.0), {}, ["gone"])
