"""CaP's search on scripted losses: the tolerance is what decides, no group collapses early, and budgets are met."""

import itertools

import numpy as np
import pytest

from edgeprune.errors import BudgetUnreachableError, UsageError
from edgeprune.plan.capsearch import CapSearch, cap_search
from edgeprune.plan.exact import evaluate
from edgeprune.plan.problem import Axis, BlockChoice, GroupChoice, Move, Problem, Term

WIDTHS = (4, 8, 12, 16, 20, 24, 28, 32)


def chain(groups=4, widths=WIDTHS):
    choices = tuple(GroupChoice(f"g{i}", widths, tuple(np.linspace(1, 0, len(widths)))) for i in range(groups))
    terms = [Term("first", (Axis(((0, 1),)),), {(w,): 0.1 * w for w in widths})]
    for i in range(groups - 1):
        table = {(a, b): 0.01 * a * b for a, b in itertools.product(widths, widths)}
        terms.append(Term(f"t{i}", (Axis(((i, 1),)), Axis(((i + 1, 1),))), table))
    return Problem(choices, (BlockChoice("b", 0.0),), (*terms, Term("branch", (), {(): 0.5}, block=0)), 0.0)


class Losses:
    """A group's loss rises as it narrows, by its own exponent, and with every pass that any group was narrowed in."""

    def __init__(self, groups=4, growth=1.1):
        self.exponents = {f"g{i}": 1.0 + i for i in range(groups)}
        self.growth = growth
        self.restarts = 0
        self.restart()

    def restart(self):
        self.restarts += 1
        self.passes = []

    def layer_error(self, move):
        return (1 - move.width / 32) ** self.exponents[move.name] * self.growth ** len(self.passes)

    def output_error(self, move):
        raise AssertionError("the search is about layers")

    def accept(self, *moves):
        self.passes.append(moves)


def test_a_larger_tolerance_never_keeps_more():
    search = CapSearch(chain(), Losses())
    plans = [search.at(t) for t in (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8, 2.0)]
    for few, many in itertools.pairwise(plans):
        assert all(many.widths[name] <= width for name, width in few.widths.items())
        assert many.predicted_ms <= few.predicted_ms
    assert len({p.predicted_ms for p in plans}) >= 6
    assert set(plans[0].widths.values()) == {32}
    assert set(plans[-1].widths.values()) == {4}


def test_the_fewest_units_within_the_tolerance_stay():
    losses = Losses(growth=1.0)
    plan = CapSearch(chain(), losses).at(0.25)
    for name, width in plan.widths.items():
        assert losses.layer_error(Move(name, width)) <= 0.25
        narrower = [w for w in WIDTHS if w < width]
        assert not narrower or losses.layer_error(Move(name, narrower[-1])) > 0.25


@pytest.mark.parametrize("step", [0.125, 0.25, 0.5])
def test_no_group_loses_more_than_a_step_in_a_pass(step):
    losses = Losses()
    CapSearch(chain(), losses, step=step).at(2.0)
    assert len(losses.passes) >= (1 - 4 / 32) / step
    widths = dict.fromkeys(losses.exponents, 32)
    for moves in losses.passes:
        for move in moves:
            assert 0 < widths[move.name] - move.width <= step * 32
            widths[move.name] = move.width


def test_coarse_candidates_move_all_the_same():
    losses = Losses()
    assert set(CapSearch(chain(widths=(8, 32)), losses).at(2.0).widths.values()) == {8}


def test_losses_are_measured_again_once_others_were_narrowed():
    steady, growing = (CapSearch(chain(), Losses(growth=g)).at(0.3).widths for g in (1.0, 2.0))
    assert all(growing[name] >= width for name, width in steady.items())
    assert growing != steady


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35, 0.2])
def test_the_budget_is_met_with_the_least_tolerance(share):
    problem, losses = chain(), Losses()
    full = evaluate(problem, {})[0]
    plan = cap_search(problem, losses)(share * full)
    assert plan.predicted_ms == evaluate(problem, plan.widths, plan.removed)[0] <= share * full
    assert plan.removed == ()
    fitting = [
        p for t in np.geomspace(1e-4, 4, 400) if (p := CapSearch(problem, Losses()).at(t)).predicted_ms <= share * full
    ]
    assert plan.predicted_ms >= fitting[0].predicted_ms * 0.97


def test_a_tolerance_once_tried_is_not_tried_again():
    problem, losses = chain(), Losses()
    plans, full = cap_search(problem, losses), evaluate(problem, {})[0]
    first = plans(0.5 * full)
    seen = losses.restarts
    assert plans(0.5 * full) == first
    assert losses.restarts == seen
    plans(0.49 * full)
    assert losses.restarts - seen < seen


def test_the_whole_network_if_that_is_within_the_budget():
    problem = chain()
    assert set(cap_search(problem, Losses())(evaluate(problem, {})[0]).widths.values()) == {32}


def test_an_unreachable_budget_names_the_smallest_latency():
    problem = chain()
    least = evaluate(problem, {f"g{i}": 4 for i in range(4)})[0]
    with pytest.raises(BudgetUnreachableError, match=f"{least:.6g} ms"):
        cap_search(problem, Losses())(0.9 * least)


def test_what_saves_no_time_stays():
    groups = (GroupChoice("g0", (8, 32), (1.0, 0.0)), GroupChoice("g1", (8, 32), (1.0, 0.0)))
    terms = tuple(Term(f"t{i}", (Axis(((i, 1),)),), {(8,): ms, (32,): 2.0}) for i, ms in enumerate((1.0, 2.0)))
    problem = Problem(groups, (), terms, 0.0)
    assert Losses().layer_error(Move("g1", 8)) < Losses().layer_error(Move("g0", 8))
    assert cap_search(problem, Losses())(3.0).widths == {"g0": 8, "g1": 32}


def test_without_trials_it_says_what_is_missing():
    with pytest.raises(UsageError, match="--data"):
        cap_search(chain(), None)
