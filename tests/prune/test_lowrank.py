"""Kept slices and filters, their combinations and what they cost, against brute force and refits in float64."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.graph.factor import by_weights, insert
from edgeprune.graph.lift import lift
from edgeprune.plan.problem import Factoring
from edgeprune.prune import lowrank
from edgeprune.prune.gram import residuals
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program, divergence, outputs
from edgeprune.prune.select.fp import backward, pursuit, system

SIDES = ("inputs", "outputs")


def slices_of(weight, side):
    """(units, ...) of one side."""
    return (weight.transpose(0, 1) if side == "inputs" else weight).detach().double().flatten(1)


def network_of(conv, size=8):
    torch.manual_seed(5)
    front = nn.Conv2d(3, conv.in_channels, 3, padding=1)
    head = nn.Conv2d(conv.out_channels, 4, 1)
    return lift(nn.Sequential(front, nn.ReLU(), conv, nn.ReLU(), head).eval(), [(1, 3, size, size)])


def observed(network, images=96):
    batches = [torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    judge = Judge(network, network, batches, images=images)
    program = Program(network)
    return lowrank.observe(program, program.by_name[network.modules_called()["2"][0].name], judge), judge


@pytest.mark.parametrize("choose", [backward, pursuit], ids=["backward", "pursuit"])
@pytest.mark.parametrize("side", SIDES)
def test_the_predicted_weight_error_is_the_measured_one(side, choose):
    """Compensation identity: what the Gram matrix says of the fit is what the multiplied-out kernel is off by. Lambda
    reshaped where it should be transposed, or told for kept units in another order, would not pass."""
    torch.manual_seed(0)
    leaf = nn.Conv2d(7, 7, 3)
    units = slices_of(leaf.weight, side)
    g = units @ units.T
    order = choose(g)
    predicted = residuals(system(g), order)
    for rank in range(1, 8):
        triple = by_weights(leaf, Factoring("", **{side: tuple(sorted(order[:rank]))}))
        left = triple.composed() - leaf.weight.detach().double()
        assert float(left.square().sum() / g.trace()) == pytest.approx(float(predicted[rank]), rel=1e-6, abs=1e-12)
        mixing = (triple.into if side == "inputs" else triple.out.T).numpy()
        if 1 < rank < 7:  # the transposition slip of lambda, as a check that this test can fail
            slip = torch.from_numpy(mixing.T.reshape(mixing.shape)).T @ slices_of(triple.core, side)
            assert float((slip - units).square().sum() / g.trace()) > 1.2 * float(predicted[rank])


@pytest.mark.parametrize("side", SIDES)
def test_order_of_the_kept_does_not_matter(side):
    torch.manual_seed(0)
    leaf = nn.Conv2d(6, 6, 3)
    one, other = (by_weights(leaf, Factoring("", **{side: kept})).composed() for kept in ((0, 2, 5), (5, 0, 2)))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("data", [False, True], ids=["weights", "outputs"])
@pytest.mark.parametrize("choose", [backward, pursuit], ids=["backward", "pursuit"])
@pytest.mark.parametrize("side", SIDES)
def test_planted_combinations_are_found_and_cost_nothing(side, choose, data):
    torch.manual_seed(2)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        units = conv.weight.transpose(0, 1) if side == "inputs" else conv.weight
        units[[1, 3, 6]] = torch.einsum("gk,k...->g...", torch.randn(3, 5), units[[0, 2, 4, 5, 7]])
    network = network_of(conv)
    layer, judge = observed(network)
    if not data:
        layer = lowrank.Layer(layer.leaf, layer.weight, None, torch.zeros_like(layer.mean))
    order = lowrank.select(layer, choose)[SIDES.index(side)]
    full, short = (lowrank.fit(layer, Factoring("2", **{side: tuple(order[:r])})) for r in (5, 4))
    assert lowrank.error(layer, full) < 1e-9 < 1e-4 < lowrank.error(layer, short)
    assert lowrank.damage(judge, "2", layer, full) < 1e-9 < lowrank.damage(judge, "2", layer, short)
    x = network.random_inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(insert(network, {"2": full}).module(*x), network.module(*x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("choose", [backward, pursuit], ids=["backward", "pursuit"])
@pytest.mark.parametrize("side", SIDES)
def test_near_the_best_subset(side, choose):
    torch.manual_seed(3)
    leaf = nn.Conv2d(8, 8, 3)
    units = slices_of(leaf.weight, side)
    layer = lowrank.Layer(leaf, lowrank._packed(leaf.weight.detach().double()), None, torch.zeros(72).double())
    order = lowrank.select(layer, choose)[SIDES.index(side)]
    found = lowrank.error(layer, lowrank.fit(layer, Factoring("", **{side: tuple(order[:4])})))

    def best_error(kept):
        rest = units - units @ torch.linalg.pinv(units[list(kept)]) @ units[list(kept)]
        return float(rest.square().sum() / units.square().sum())

    best = min(best_error(kept) for kept in itertools.combinations(range(8), 4))
    assert best - 1e-9 <= found <= 1.25 * best
    assert found == pytest.approx(best_error(order[:4]), rel=1e-6)


@pytest.mark.parametrize(
    "factoring", [{"inputs": (0, 2, 5)}, {"outputs": (1, 2, 6)}, {"inputs": (1, 4, 5, 7), "outputs": (0, 3, 6)}]
)
def test_the_fit_on_outputs_is_least_squares(factoring, monkeypatch):
    """Against numpy on the patches themselves, without a ridge."""
    monkeypatch.setattr(lowrank, "RIDGE", 1e-12)
    torch.manual_seed(4)
    network = network_of(nn.Conv2d(8, 8, 3, padding=1, stride=2))
    layer, judge = observed(network)
    triple = lowrank.fit(layer, Factoring("2", **factoring))
    given = judge.values([network.modules_called()["2"][0].args[0].name])
    x = torch.cat(next(iter(given.values()))).double()
    conv = network.module.get_submodule("2")
    want = torch.nn.functional.conv2d(x, conv.weight.double(), conv.bias.double(), 2, 1)
    target = want.movedim(1, -1).flatten(0, 2).detach().numpy()

    read = torch.einsum("rn,bnhw->brhw", triple.into, x) if "inputs" in factoring else x
    a = torch.nn.functional.unfold(read, 3, padding=1, stride=2).movedim(1, -1).flatten(0, 1).numpy()
    if "outputs" in factoring:
        a = a @ triple.core.flatten(1).T.numpy()
    design = np.hstack([a, np.ones((len(a), 1))])
    best = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
    ours = torch.nn.functional.conv2d(x, triple.composed(), triple.bias, 2, 1).movedim(1, -1).flatten(0, 2).numpy()
    assert ((target - ours) ** 2).sum() == pytest.approx((best**2).sum(), rel=1e-4)
    variance = ((target - target.mean(0)) ** 2).sum()
    assert lowrank.error(layer, triple) == pytest.approx(((target - ours) ** 2).sum() / variance, rel=1e-3)


def test_outputs_are_nearer_than_by_weights_alone():
    torch.manual_seed(6)
    network = network_of(nn.Conv2d(8, 12, 3, padding=1))
    layer, _ = observed(network)
    for factoring in (Factoring("2", (0, 1, 4)), Factoring("2", None, (3, 5, 6, 9)), Factoring("2", (1, 2), (4, 5))):
        by_outputs = lowrank.error(layer, lowrank.fit(layer, factoring))
        assert by_outputs < 0.98 * lowrank.error(layer, by_weights(layer.leaf, factoring))


def test_damage_is_that_of_the_network_with_the_chain_in_it():
    torch.manual_seed(7)
    network = network_of(nn.Conv2d(8, 12, 3, padding=1))
    layer, judge = observed(network)
    triple = lowrank.fit(layer, Factoring("2", (0, 1, 4), (2, 3, 5, 7)))
    chain = Program(insert(network, {"2": triple}))
    measured = divergence(outputs(chain, judge.batches), judge.expected)
    assert measured > 1e-3
    assert lowrank.damage(judge, "2", layer, triple) == pytest.approx(measured, rel=1e-4)
