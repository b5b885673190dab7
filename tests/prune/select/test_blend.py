"""Clusters of criteria, and the evolution of their mixture."""

import numpy as np
import pytest
import torch
from nets import images, small

from edgeprune.graph.channels import analyse
from edgeprune.prune.consumers import find_consumers, without_units
from edgeprune.prune.judge import Judge
from edgeprune.prune.select import blend as blending
from edgeprune.prune.select.blend import CRITERIA, SHARE, TRIALS, blend, evolve, order_of, ranks_of, representatives
from edgeprune.prune.select.cap import cap
from edgeprune.prune.select.curve import from_scores
from edgeprune.prune.select.fp import fp_backward_out
from edgeprune.prune.select.magnitude import magnitude


@pytest.fixture(scope="module")
def judge():
    network = small()
    return Judge(network, network, [images(96)])


def group_of(judge, name="blocks.2.conv1"):
    group = analyse(judge.program.network).group(name)
    return group, find_consumers(judge, judge.program, group)


def test_criteria_that_say_the_same_are_one_cluster():
    rng = np.random.default_rng(0)
    a, b = rng.permutation(30), rng.permutation(30)
    near = a.copy()
    near[[3, 4]] = near[[4, 3]]
    ranks = np.stack([ranks_of(o) for o in (b, a, near, a, b)])
    found = representatives(ranks)
    assert len(found) == 2
    assert found[0] in (0, 4)
    assert found[1] in (1, 3)  # twice the same: nearer to the cluster than the one with a swap
    assert representatives(ranks[:1]) == [0]
    assert representatives(np.stack([ranks_of(a), ranks_of(a[::-1])])) == [0, 1]


def test_a_single_unit_needs_no_clusters():
    assert representatives(np.ones((3, 1))) == [0]


def test_a_one_hot_mixture_is_that_criterion():
    rng = np.random.default_rng(1)
    orders = [rng.permutation(17) for _ in range(4)]
    ranks = np.stack([ranks_of(o) for o in orders])
    for i, order in enumerate(orders):
        assert order_of(np.eye(4)[i] @ ranks).tolist() == order.tolist()
        assert ranks[i][order[0]] == 17
        assert ranks[i][order[-1]] == 1


def test_evolution_finds_a_mixture_that_no_criterion_is():
    """Two criteria, each blind to half of the units that matter."""
    rng = np.random.default_rng(0)
    value = np.concatenate([rng.uniform(1, 2, 6), rng.uniform(1, 2, 6), np.zeros(12)])
    half = np.arange(24)[:, None] < [6, 12]
    left = order_of(np.where(half[:, 0], value, rng.uniform(0, 0.9, 24)))
    right = order_of(np.where(half[:, 1] & ~half[:, 0], value, rng.uniform(0, 0.9, 24)))
    ranks = np.stack([ranks_of(o) for o in (left, right)])

    def lost(order):
        return value[order[12:]].sum()

    mixture = evolve(ranks, 12, lost)
    assert mixture.min() >= 0
    assert mixture.sum() == pytest.approx(1)
    assert lost(order_of(mixture @ ranks)) < 0.7 * min(lost(left), lost(right))


def test_trials_are_bounded_and_none_is_made_twice():
    rng = np.random.default_rng(0)
    ranks = np.stack([ranks_of(rng.permutation(40)) for _ in range(5)])
    seen = []

    def fitness(order):
        seen.append(frozenset(order[:20].tolist()))
        return float(len(seen))

    mixture = evolve(ranks, 20, fitness)
    assert 6 <= len(seen) <= TRIALS
    assert len(set(seen)) == len(seen)
    assert mixture.tolist() == [1, 0, 0, 0, 0]  # the first is the fittest here
    again = evolve(ranks, 20, lambda order: -order[:20].sum())
    assert again.tolist() == evolve(ranks, 20, lambda order: -order[:20].sum()).tolist()


def test_a_blend_is_no_worse_than_any_of_its_criteria(judge):
    group, consumers = group_of(judge)
    curve = blend(judge, [group])(group, consumers)
    width = round(SHARE * group.size)

    def error(order):
        return judge.exchanged_error(without_units(consumers, order[width:].tolist()))

    ranks = np.stack([ranks_of(c(judge, [group])(group, consumers).order) for c in CRITERIA])
    own = [error(order_of(ranks[i])) for i in representatives(ranks)]
    assert len(own) > 1
    assert error(curve.order) <= min(own)
    assert sorted(curve.order.tolist()) == list(range(group.size))
    assert (np.diff(curve.cost) <= 0).all()
    assert curve.cost[-1] == 0
    repeated = blend(judge, [group])(group, consumers)
    assert repeated.order.tolist() == curve.order.tolist()


def test_one_criterion_blends_to_itself(judge, monkeypatch):
    group, consumers = group_of(judge)
    monkeypatch.setattr(blending, "TRIALS", 3)
    for criterion in (cap, magnitude, fp_backward_out):
        own = criterion(judge, [group])(group, consumers).order.tolist()
        assert blend(judge, [group], [criterion, criterion])(group, consumers).order.tolist() == own


def test_readers_without_a_matrix(judge):
    group, _ = group_of(judge)
    bare = find_consumers(None, judge.program, group)
    scores = torch.rand(group.size, generator=torch.Generator().manual_seed(0))
    curve = blend(judge, [group], [lambda j, g: lambda group, consumers: from_scores(scores)])(group, bare)
    assert curve.order.tolist() == from_scores(scores).order.tolist()
    assert (np.diff(curve.cost) < 0).all()
