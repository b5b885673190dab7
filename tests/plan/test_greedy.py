"""Greedy paths against exhaustive choice at every step, and against the exact planner on what both can see."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_trials import Additive, Growing
from test_exact import random_problem

from edgeprune.errors import BudgetUnreachableError, UsageError
from edgeprune.plan import greedy
from edgeprune.plan.exact import evaluate, exact
from edgeprune.plan.greedy import hbgs, hbgts
from edgeprune.plan.problem import Axis, BlockChoice, GroupChoice, Move, Problem, Term

shapes = st.fixed_dictionaries(
    {
        "n_groups": st.integers(1, 5),
        "n_blocks": st.integers(0, 3),
        "n_terms": st.integers(1, 7),
        "steps": st.booleans(),
        "spread": st.sampled_from([1.0, 3.0]),
    }
)


def chain(widths=(4, 8, 12, 16), groups=3, seed=0):
    """Layers in a row, each with a table over its input and output; and a block beside them."""
    rng = np.random.default_rng(seed)
    choices = tuple(
        GroupChoice(f"g{i}", widths, (*np.sort(rng.uniform(0.1, 1, len(widths) - 1))[::-1].tolist(), 0.0))
        for i in range(groups)
    )
    terms = [Term("first", (Axis(((0, 1),)),), {(w,): 0.1 * w for w in widths})]
    for i in range(groups - 1):
        table = {(a, b): 0.01 * a * b * rng.uniform(0.9, 1.1) for a, b in itertools.product(widths, widths)}
        terms.append(Term(f"t{i}", (Axis(((i, 1),)), Axis(((i + 1, 1),))), table))
    terms.append(Term("branch", (), {(): 0.5}, block=0))
    return Problem(choices, (BlockChoice("b", 0.3),), tuple(terms), 0.0)


def state_of(problem, moves):
    widths = {m.name: m.width for m in moves if m.width is not None}
    return widths, [m.name for m in moves if m.width is None]


def every_next(problem, moves):
    """(saving, move) of the first narrower width that saves, of every group, and of every block."""
    widths, removed = state_of(problem, moves)
    now = evaluate(problem, widths, removed)[0]
    gone = {i for i, b in enumerate(problem.blocks) if b.name in removed}
    for group in problem.groups:
        if group.block in gone:
            continue
        for width in sorted((w for w in group.widths if w < widths.get(group.name, group.widths[-1])), reverse=True):
            saved = now - evaluate(problem, {**widths, group.name: width}, removed)[0]
            if saved > 1e-9 * now:
                yield saved, Move(group.name, width)
                break
    for block in problem.blocks:
        saved = now - evaluate(problem, widths, [*removed, block.name])[0]
        if block.name not in removed and saved > 1e-9 * now:
            yield saved, Move(block.name)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=shapes)
def test_never_beats_the_exact_planner_on_the_same_additive_problem(seed, shape):
    problem = random_problem(seed, **shape)
    trials = Additive(problem)
    plans = hbgts(problem, trials)
    full = evaluate(problem, {})[0]
    for share in (1.0, 0.8, 0.5):
        try:
            plan = plans(share * full)
        except BudgetUnreachableError:
            continue
        assert plan.predicted_ms <= share * full * (1 + 1e-9)
        assert (plan.predicted_ms, plan.damage) == evaluate(problem, plan.widths, plan.removed)
        best = exact(problem)(share * full)
        assert plan.damage >= best.damage * (1 - 5e-4) - 1e-12


def growing(problem, seed):
    rng = np.random.default_rng(seed)
    moves = [Move(g.name, w) for g in problem.groups for w in g.widths[:-1]] + [Move(b.name) for b in problem.blocks]
    factor = {m.name: float(rng.uniform(1, 1.3)) for m in moves}
    return Growing({m: float(rng.uniform(0.1, 1)) for m in moves}, lambda m, done: factor[m.name] ** len(done))


@pytest.mark.parametrize("seed", range(8))
def test_every_choice_is_the_exhaustive_one_though_few_are_measured(seed):
    """The least error per millisecond of all moves there are, at every step down to the end."""
    problem = chain(groups=6, seed=seed)
    trials = growing(problem, seed)
    full = evaluate(problem, {})[0]
    with pytest.raises(BudgetUnreachableError, match="smallest latency"):
        hbgs(problem, trials)(0.01 * full)
    path, asked = list(trials.accepted), len(trials.asked)
    assert len(path) > 15
    trials.restart()
    exhaustive = 0
    for n, move in enumerate(path):
        options = [(trials.price(m) / saved, m) for saved, m in every_next(problem, path[:n])]
        exhaustive += len(options)
        assert min(options, key=lambda o: o[0])[1] == move
        trials.accept(move)
    assert not list(every_next(problem, path))
    assert asked < 0.7 * exhaustive


def test_no_more_than_a_few_stale_errors_are_measured_in_a_round():
    problem = chain(widths=(8, 16), groups=20)
    problem = Problem(problem.groups, (), problem.terms[:-1], 0.0)
    moves = [Move(g.name, 8) for g in problem.groups]
    trials = Growing(dict.fromkeys(moves, 1.0), lambda move, done: 100.0 ** len(done))  # every guess is far too low
    plans, full = hbgs(problem, trials), evaluate(problem, {})[0]
    plans(0.99 * full)
    assert sorted(trials.asked, key=str) == sorted(moves, key=str)
    before = len(trials.asked)
    plans(0.9 * full)
    assert 0 < len(trials.asked) - before <= greedy.LOOKS * (len(trials.accepted) - 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=shapes, share=st.floats(0.3, 1.0))
def test_no_move_of_a_plan_could_be_left_out(seed, shape, share):
    """Taking back the last step of any group, or any block, would exceed the budget: the last move wastes nothing."""
    problem = random_problem(seed, **shape)
    budget, trials = share * evaluate(problem, {})[0], Additive(problem)
    try:
        plan = hbgts(problem, trials)(budget)
    except BudgetUnreachableError:
        return
    reached = {g.name: [g.widths[-1]] for g in problem.groups}
    for move in trials.accepted:
        if move.width is not None:
            reached[move.name].append(move.width)
    for name, width in plan.widths.items():
        assert width in reached[name]
        if n := reached[name].index(width):
            assert evaluate(problem, {**plan.widths, name: reached[name][n - 1]}, plan.removed)[0] > budget


def test_a_smaller_budget_goes_on_and_a_larger_one_asks_nothing():
    problem = chain()
    trials = Additive(problem)
    plans, full = hbgts(problem, trials), evaluate(problem, {})[0]
    first = plans(0.8 * full)
    steps, asked = len(trials.accepted), len(trials.asked)
    second = plans(0.5 * full)
    assert len(trials.accepted) > steps
    assert second.predicted_ms < first.predicted_ms
    asked = len(trials.asked)
    assert plans(0.8 * full) == first
    assert plans(0.5 * full) == second
    assert plans(full).widths == {g.name: 16 for g in problem.groups}
    assert len(trials.asked) == asked


def test_what_saves_nothing_is_never_moved_however_free():
    groups = (GroupChoice("flat", (8, 16), (0.0, 0.0)), GroupChoice("steep", (8, 16), (1.0, 0.0)))
    terms = (
        Term("a", (Axis(((0, 1),)),), {(8,): 2.0, (16,): 2.0}),
        Term("b", (Axis(((1, 1),)),), {(8,): 1.0, (16,): 2.0}),
    )
    trials = Additive(Problem(groups, (), terms, 0.0))
    plan = hbgts(trials.problem, trials)(3.0)
    assert plan.widths == {"flat": 16, "steep": 8}
    assert trials.asked == [Move("steep", 8)]


def test_a_cliff_is_stepped_over():
    """The middle width is slower than the full one: the next move is to the one behind it."""
    group = GroupChoice("a", (8, 16, 32), (0.5, 0.2, 0.0))
    problem = Problem((group,), (), (Term("t", (Axis(((0, 1),)),), {(8,): 1.0, (16,): 5.0, (32,): 4.0}),), 0.0)
    assert hbgts(problem, Additive(problem))(3.0).widths == {"a": 8}


def test_of_two_free_moves_the_faster_goes_first():
    groups = tuple(GroupChoice(name, (8, 16), (0.0, 0.0)) for name in ("slow", "fast"))
    tables = ({(8,): 1.9, (16,): 2.0}, {(8,): 1.0, (16,): 2.0})
    terms = tuple(Term(f"t{i}", (Axis(((i, 1),)),), table) for i, table in enumerate(tables))
    problem = Problem(groups, (), terms, 0.0)
    assert hbgts(problem, Additive(problem))(3.95).widths == {"slow": 16, "fast": 8}


def test_a_block_takes_its_groups_along():
    inner = GroupChoice("inner", (8, 16), (0.9, 0.0), block=0)
    outer = GroupChoice("outer", (8, 16), (5.0, 0.0))
    terms = (
        Term("in", (Axis(((0, 1),)),), {(8,): 1.0, (16,): 2.0}, block=0),
        Term("out", (Axis(((1, 1),)),), {(8,): 1.0, (16,): 2.0}),
    )
    problem = Problem((inner, outer), (BlockChoice("b", 0.1),), terms, 0.0)
    trials = Additive(problem)
    plan = hbgts(problem, trials)(1.5)
    assert trials.accepted == [Move("b"), Move("outer", 8)]
    assert plan.removed == ("b",)
    assert plan.widths == {"outer": 8}


@pytest.mark.parametrize("planner", [hbgs, hbgts])
def test_without_trials_they_say_what_is_missing(planner):
    with pytest.raises(UsageError, match="--data"):
        planner(chain(), None)
