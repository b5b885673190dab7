"""The planner against enumeration of everything, on small problems of every shape."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import BudgetUnreachableError
from edgeprune.plan import eliminate
from edgeprune.plan.exact import evaluate, smallest, solve
from edgeprune.plan.problem import Axis, BlockChoice, GroupChoice, Problem, Term


def plans(problem):
    """Every plan there is, as (widths, removed)."""
    for removed in itertools.product((False, True), repeat=len(problem.blocks)):
        live = [g for g in problem.groups if g.block is None or not removed[g.block]]
        names = tuple(b.name for b, gone in zip(problem.blocks, removed, strict=True) if gone)
        for widths in itertools.product(*(g.widths for g in live)):
            yield {g.name: w for g, w in zip(live, widths, strict=True)}, names


def brute_force(problem):
    """(least latency, least damage within the budget)"""
    values = [evaluate(problem, *plan) for plan in plans(problem)]
    fitting = [d for ms, d in values if ms <= problem.budget_ms * (1 + 1e-9)]
    return min(ms for ms, _ in values), min(fitting, default=math.inf)


def make_term(name, axes, groups, rng, block=None, steps=False):
    """A table over everything that the widths can produce, without any order in it."""
    table = {}
    involved = sorted({g for axis in axes for g, _ in axis.terms})
    for widths in itertools.product(*(groups[g].widths for g in involved)):
        chosen = dict(zip(involved, widths, strict=True))
        key = tuple(axis.at(chosen) for axis in axes)
        if key not in table:
            table[key] = float(rng.integers(1, 6)) if steps else float(rng.uniform(0.1, 2.0))
    return Term(name, tuple(axes), table, block)


def random_problem(seed, *, n_groups, n_blocks, n_terms, steps, spread):
    rng = np.random.default_rng(seed)
    blocks = tuple(BlockChoice(f"b{i}", float(10 ** rng.uniform(-spread, 0))) for i in range(n_blocks))
    groups = []
    for i in range(n_groups):
        count = int(rng.integers(1, 5))
        widths = tuple(sorted(int(w) for w in rng.choice(np.arange(1, 20), count, replace=False)))
        damage = np.sort(10 ** rng.uniform(-spread, 0, count))[::-1].copy()
        damage[-1] = 0.0
        if rng.random() < 0.3:
            rng.shuffle(damage)
        if rng.random() < 0.2:
            damage[:] = 0.0
        home = int(rng.integers(n_blocks)) if n_blocks and rng.random() < 0.6 else None
        groups.append(GroupChoice(f"g{i}", widths, tuple(float(d) for d in damage), home))
    terms = []
    for i in range(n_terms):
        block = int(rng.integers(n_blocks)) if n_blocks and rng.random() < 0.6 else None
        usable = [g for g in range(n_groups) if groups[g].block is None or groups[g].block == block]
        axes = []
        for _ in range(int(rng.integers(0, 3))):
            size = min(len(usable), int(rng.choice([0, 1, 1, 1, 2, 3])))
            chosen = sorted(int(g) for g in rng.choice(usable, size, replace=False)) if size else []
            axes.append(Axis(tuple((g, int(rng.integers(1, 3))) for g in chosen), int(rng.integers(0, 4))))
        terms.append(make_term(f"t{i}", axes, groups, rng, block, steps))
    problem = Problem(tuple(groups), blocks, tuple(terms), 0.0)
    values = sorted(evaluate(problem, *plan)[0] for plan in plans(problem))
    where = rng.random()
    budget = (
        values[int(where * (len(values) - 1))] if rng.random() < 0.5 else values[0] + where * (values[-1] - values[0])
    )
    return Problem(problem.groups, problem.blocks, problem.terms, budget * (0.99 if rng.random() < 0.05 else 1.0))


def assert_optimal(problem, gap):
    least, best = brute_force(problem)
    assert smallest(problem) == pytest.approx(least, rel=1e-12)
    if math.isinf(best):
        with pytest.raises(BudgetUnreachableError, match=f"{least:.6g} ms"):
            solve(problem, gap=gap)
        return
    plan = solve(problem, gap=gap)
    latency, damage = evaluate(problem, plan.widths, plan.removed)
    assert latency <= problem.budget_ms * (1 + 1e-9)
    assert plan.predicted_ms == latency
    assert plan.damage == damage
    assert plan.gap is not None
    assert plan.gap <= gap + 1e-6
    assert damage <= best / (1 - gap) * (1 + 1e-9)
    # the proof must hold: nothing is better than what the gap admits
    assert damage * (1 - plan.gap) <= best * (1 + 1e-9)


shapes = st.fixed_dictionaries(
    {
        "n_groups": st.integers(1, 5),
        "n_blocks": st.integers(0, 3),
        "n_terms": st.integers(1, 7),
        "steps": st.booleans(),
        "spread": st.sampled_from([1.0, 3.0, 8.0]),
    }
)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=shapes, gap=st.sampled_from([0.0, 5e-4, 0.05]))
def test_equals_enumeration(seed, shape, gap):
    assert_optimal(random_problem(seed, **shape), gap)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=shapes)
def test_integer_programme_alone_equals_enumeration(seed, shape):
    """The way taken when the network is too wide for elimination."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eliminate, "MAX_CELLS", 0)
        assert_optimal(random_problem(seed, **shape), 0.0)
