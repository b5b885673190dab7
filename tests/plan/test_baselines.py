"""The baselines: one share for all groups, and planning on multiply-adds. They meet budgets, and are what they say."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exact import plans, random_problem

from edgeprune.errors import BudgetUnreachableError, TableError
from edgeprune.plan.exact import evaluate, exact
from edgeprune.plan.flops import flops
from edgeprune.plan.problem import Axis, BlockChoice, GroupChoice, Problem, Term
from edgeprune.plan.uniform import uniform


def two_groups(small=(4, 8, 16), large=(16, 32, 48, 64)):
    groups = tuple(GroupChoice(n, w, tuple(np.linspace(1, 0, len(w)))) for n, w in (("small", small), ("large", large)))
    axes = (Axis(((0, 1),)), Axis(((1, 1),)))
    table = {(a, b): 0.01 * a * b for a, b in itertools.product(small, large)}
    return Problem(groups, (BlockChoice("b", 0.0),), (Term("t", axes, table), Term("x", (), {(): 1.0}, block=0)), 0.0)


def nearest(group, share):
    return min(reversed(group.widths), key=lambda w: abs(w - share * group.widths[-1]))


def test_uniform_gives_every_group_the_same_share_and_keeps_the_blocks():
    problem = two_groups()
    full = evaluate(problem, {})[0]
    seen = set()
    for budget in np.linspace(0.2, 1, 30) * full:
        plan = uniform(problem)(budget)
        assert plan.removed == ()
        fitting = [s for s in np.linspace(0, 1, 2001) if shared(problem, s)[0] <= budget]
        assert plan.widths == shared(problem, max(fitting))[1]
        assert plan.predicted_ms <= budget
        seen.add(tuple(plan.widths.values()))
    assert len(seen) >= 4


def shared(problem, share):
    widths = {g.name: nearest(g, share) for g in problem.groups}
    return evaluate(problem, widths)[0], widths


def test_uniform_names_the_smallest_latency_on_its_way():
    problem = two_groups()
    with pytest.raises(BudgetUnreachableError, match=r"1\.64 ms"):  # 4 by 16, and the block that is kept
        uniform(problem)(1.6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.3, 1.0))
def test_uniform_meets_every_budget_it_accepts(seed, share):
    problem = random_problem(seed, n_groups=4, n_blocks=2, n_terms=6, steps=False, spread=1.0)
    budget = share * evaluate(problem, {})[0]
    try:
        plan = uniform(problem)(budget)
    except BudgetUnreachableError:
        return
    assert evaluate(problem, plan.widths, plan.removed)[0] <= budget * (1 + 1e-9)


def counted(problem, seed=0):
    """The problem with multiply-adds that have nothing to do with its latency."""
    rng = np.random.default_rng(seed)
    terms = []
    for term in problem.terms:
        macs = {key: float(rng.integers(0, 1000)) for key in sorted(term.latency_ms)}
        terms.append(Term(term.name, term.axes, term.latency_ms, term.block, macs))
    return Problem(problem.groups, problem.blocks, tuple(terms), problem.budget_ms)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.1, 1.0))
def test_flops_is_the_best_plan_within_the_same_share_of_multiply_adds(seed, share):
    problem = counted(random_problem(seed, n_groups=3, n_blocks=2, n_terms=5, steps=False, spread=1.0), seed)
    work = Problem(
        problem.groups, problem.blocks, tuple(Term(t.name, t.axes, t.macs, t.block) for t in problem.terms), 0
    )
    full_ms, full_macs = evaluate(problem, {})[0], evaluate(work, {})[0]
    if full_macs == 0:
        return
    values = [evaluate(work, *plan) for plan in plans(work)]
    within = [damage for macs, damage in values if macs <= share * full_macs * (1 + 1e-9)]
    if not within:
        with pytest.raises(BudgetUnreachableError, match="multiply-adds"):
            flops(problem)(share * full_ms)
        return
    plan = flops(problem)(share * full_ms)
    macs, damage = evaluate(work, plan.widths, plan.removed)
    assert macs <= share * full_macs * (1 + 1e-9)
    assert damage <= min(within) / (1 - 5e-4) + 1e-12
    assert plan.predicted_ms == pytest.approx(macs / full_macs * full_ms)


def test_flops_on_multiply_adds_that_are_the_latency_is_the_exact_planner():
    problem = two_groups()
    terms = tuple(Term(t.name, t.axes, t.latency_ms, t.block, {k: 1e6 * v for k, v in t.latency_ms.items()})
                  for t in problem.terms)  # fmt: skip
    problem = Problem(problem.groups, problem.blocks, terms, 0.0)
    for share in (0.9, 0.6, 0.3):
        budget = share * evaluate(problem, {})[0]
        mine, theirs = flops(problem)(budget), exact(problem)(budget)
        assert (mine.widths, mine.removed) == (theirs.widths, theirs.removed)
        assert mine.predicted_ms == pytest.approx(theirs.predicted_ms)


def test_flops_without_multiply_adds_says_so():
    with pytest.raises(TableError, match="multiply-adds"):
        flops(two_groups())
