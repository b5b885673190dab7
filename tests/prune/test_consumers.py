"""Readers of a group as least-squares systems: grouped, strided, padded, and the last linear."""

import numpy as np
import pytest
import torch
from nets import images
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.masking import masked_outputs
from edgeprune.prune.consumers import RIDGE, find_consumers, without_units
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import divergence
from edgeprune.prune.sensitivity import rank_groups


def judged(module, size=8, count=64):
    network = lift(module.eval(), [(1, 3, size, size)])
    return network, analyse(network), Judge(network, network, [images(count, size=size)])


def grouped():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, 2, 1, groups=4), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 5, 4),
    )  # fmt: skip


def test_a_grouped_convolution_is_one_reader_a_part():
    network, channels, judge = judged(grouped())
    group = channels.group("0")
    consumers = find_consumers(judge, judge.program, group)
    assert [c.part for c in consumers] == [0, 1, 2, 3]
    assert all(c.columns.shape == (6, 9) and c.packed.shape == (55, 8) for c in consumers)
    plain = find_consumers(None, judge.program, group)
    expected = masked_outputs(network, channels, {"0": [0, 2, 3, 5]}, (judge.batches[0][0],))
    with torch.no_grad():
        full = network.module(judge.batches[0][0])
    zeroed = judge.exchanged_error(without_units(plain, [1, 4]))
    assert zeroed == pytest.approx(divergence(expected, [full]), rel=1e-4)
    assert judge.exchanged_error(without_units(consumers, [1, 4])) < zeroed


def test_grouped_layers_are_ranked():
    _, channels, judge = judged(grouped())
    ranking = rank_groups(judge, channels)["0"]
    assert sorted(ranking.order.tolist()) == list(range(6))
    assert ranking.damage[1] > ranking.damage[5] > 0


def test_refitted_weights_minimise_the_ridge_objective():
    _, channels, judge = judged(grouped())
    consumers = find_consumers(judge, judge.program, channels.group("3"))
    (c,) = consumers
    modules = without_units(consumers, [0, 5])
    gone = c.columns[[0, 5]].reshape(-1)
    stays = np.setdiff1d(np.arange(len(c.packed)), gone)
    g, w = c.gram.numpy(), c.packed.double().numpy()
    penalty = np.diag([*[RIDGE * np.diag(g)[:-1].mean()] * (len(g) - 1), 1e-9 * g[-1, -1]])
    expected = w[stays] + np.linalg.solve((g + penalty)[np.ix_(stays, stays)], g[np.ix_(stays, gone)] @ w[gone])
    new = modules["6"]
    got = np.concatenate([new.weight.detach().permute(2, 3, 1, 0).reshape(-1, 5), new.bias.detach()[None]])
    np.testing.assert_allclose(got[stays], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(got[gone]).max() == 0
