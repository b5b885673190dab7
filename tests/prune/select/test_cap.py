"""CaP's closed form against least-squares refits of real readers, and what it must not see."""

import numpy as np
import pytest
import torch
from nets import images
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.prune.consumers import find_consumers
from edgeprune.prune.gram import Elimination
from edgeprune.prune.judge import Judge
from edgeprune.prune.patches import output_places, rows_at
from edgeprune.prune.select.cap import cap, systems
from edgeprune.prune.select.magnitude import reading, weights


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 8)
    )


def judged(module, x):
    network = lift(module, [(1, 3, 8, 8)])
    judge = Judge(network, network, [x])
    group = analyse(network).group("0")
    return judge, group, find_consumers(judge, judge.program, group)


def test_the_loss_is_that_of_refitting_the_reader():
    """On the rows it has sampled, in float64, bias refitted too; every subset on the way down."""
    judge, _, consumers = judged(three_layers(), images(64))
    (c,) = consumers
    source = judge.values(c.sources)[c.sources[0]]
    where = judge.reference.where(output_places(c.leaf, source[0]), 2048)
    rows = rows_at(c.leaf, source, where).double().numpy()
    c.gram = torch.from_numpy(rows.T @ rows)
    target = rows @ c.packed.double().numpy()
    c.energy = float(np.square(target - target.mean(0)).sum())
    kernel = Elimination(systems(consumers), ridge=0.0)
    removed, damage = kernel.order()
    for count in range(1, 8):
        stays = np.setdiff1d(np.arange(rows.shape[1]), c.columns[removed[:count]].reshape(-1))
        left = target - rows[:, stays] @ np.linalg.lstsq(rows[:, stays], target, rcond=None)[0]
        assert damage[count - 1] == pytest.approx(np.square(left).sum() / c.energy, rel=1e-8)
        np.testing.assert_allclose(left.mean(0), 0, atol=1e-9)  # the bias absorbs the means


def test_an_energy_is_the_outputs_variance():
    judge, _, (c,) = judged(three_layers(), images(64))
    source = judge.values(c.sources)[c.sources[0]]
    where = judge.reference.where(output_places(c.leaf, source[0]), 8192)
    with torch.no_grad():
        out = torch.cat([c.leaf(x) for x in source]).movedim(1, -1)[where].double()
    assert c.energy == pytest.approx(float((out - out.mean(0)).square().sum()), rel=1e-4)


def test_it_does_not_see_the_images_that_damage_is_measured_on():
    first, second = images(64, seed=1), images(64, seed=2)
    mixed = torch.cat([first[:32], second[32:]])
    curves = []
    for x in (first, mixed):
        judge, group, consumers = judged(three_layers(), x)
        curves.append(cap(judge, [group])(group, consumers))
    assert curves[0].order.tolist() == curves[1].order.tolist()
    np.testing.assert_array_equal(curves[0].cost, curves[1].cost)
    assert not torch.equal(first[32:], mixed[32:])


def test_sees_what_a_twin_can_take_over():
    module = three_layers()
    with torch.no_grad():
        module[0].weight[5], module[0].bias[5] = 4 * module[0].weight[2], 4 * module[0].bias[2]
    judge, group, consumers = judged(module, images(64))
    curve = cap(judge, [group])(group, consumers)
    assert curve.order[-1] in (2, 5)
    assert weights(judge.program, group).argmin() != 5


def test_readers_without_a_matrix_go_by_their_weights():
    judge, group, _ = judged(three_layers(), images(64))
    bare = find_consumers(None, judge.program, group)
    found = cap(judge, [group])(group, bare)
    scores = reading(bare)
    assert found.order.tolist() == scores.argsort(descending=True).tolist()
