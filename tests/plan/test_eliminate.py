"""Elimination's minimum and min-marginals against enumeration of all assignments."""

import itertools

import numpy as np
import pytest
from test_exact import random_problem

from edgeprune.plan.eliminate import Elimination
from edgeprune.plan.factors import build
from edgeprune.plan.improve import Improver


def assignments(model):
    """States of groups and blocks that fit together: 'gone' exactly when the block is removed."""
    count = model.n_groups + model.n_blocks
    for states in itertools.product(*(range(v.size) for v in model.variables[:count])):
        if all(
            v.block is None or (s == v.gone) == (states[v.block] == 1)
            for s, v in zip(states, model.variables[:count], strict=True)
        ):
            yield np.array(states)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("price", [0.0, 0.3, 5.0])
def test_marginals_are_the_least_cost_through_each_state(seed, price):
    problem = random_problem(seed, n_groups=4, n_blocks=2, n_terms=5, steps=False, spread=1.0)
    model = build(problem)
    improver = Improver(problem, model)
    expected = [np.full(v.size, np.inf) for v in model.variables]
    for states in assignments(model):
        cost = improver.damage(states) + price * (improver.latency(states) - model.constant_ms)
        for variable, state in enumerate(improver.complete(states)):
            expected[variable][state] = min(expected[variable][state], cost)
    tree = Elimination(model)
    value, marginals = tree.marginals(1.0, price)
    for got, want in zip(marginals, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert value == pytest.approx(min(e.min() for e in expected), rel=1e-9, abs=1e-12)
    least, states = tree.minimise(1.0, price)
    assert least == value
    cost = improver.damage(states) + price * (improver.latency(states) - model.constant_ms)
    assert cost == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_restricting_keeps_a_block_and_its_groups_in_step():
    problem = random_problem(3, n_groups=5, n_blocks=2, n_terms=6, steps=False, spread=1.0)
    model = build(problem)
    block, group = next((v.block, i) for i, v in enumerate(model.variables) if v.block is not None)
    masks = [np.ones(v.size, bool) for v in model.variables]
    masks[group][-1] = False  # not gone
    kept = model.restrict(masks)
    assert kept.variables[block].states.tolist() == [0]
    assert all(v.gone is None for v in kept.variables if v.block == block)
    masks[group][:] = False
    masks[group][-1] = True  # gone
    removed = model.restrict(masks)
    assert removed.variables[block].states.tolist() == [1]
    assert all(v.size == 1 for v in removed.variables if v.block == block and v.kind == "group")
