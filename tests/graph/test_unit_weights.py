"""Weights of single units, in every kind of layer, against loops over positions."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import zero_inputs
from edgeprune.graph.unit_weights import UnitWeights

LAYERS = {
    "conv": lambda: nn.Conv2d(6, 4, 3),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
    "grouped transposed": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
    "linear": lambda: nn.Linear(6, 4),
}


def read_by(leaf, position):
    """Where the weight reads this channel, as zeroing it shows."""
    other = copy.deepcopy(leaf)
    nn.init.ones_(other.weight)
    zero_inputs(other, [position])
    return other.weight == 0


def made_by(leaf, position):
    """Where the weight makes this channel, as its gradient shows."""
    leaf.zero_grad()
    x = torch.ones(1, 6) if isinstance(leaf, nn.Linear) else torch.ones(1, 6, 3, 3)
    leaf(x)[:, position].sum().backward()
    return leaf.weight.grad != 0


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inputs", [True, False])
def test_energies_and_factors(kind, inputs):
    torch.manual_seed(0)
    leaf = LAYERS[kind]()
    if isinstance(leaf, nn.Conv2d):
        leaf = leaf.to(memory_format=torch.channels_last)
    channels = 6 if inputs else leaf(torch.ones(1, 6) if kind == "linear" else torch.ones(1, 6, 3, 3)).shape[1]
    index = np.array([[1, 3], [2, 0]])
    assert index.max() < channels
    where = [
        sum(((read_by if inputs else made_by)(leaf, p) for p in unit), start=torch.tensor(False)) for unit in index
    ]
    weights = UnitWeights(leaf, inputs, index)
    before, bias = leaf.weight.detach().clone(), leaf.bias.detach().clone()
    expected = torch.stack([before[w].square().sum() for w in where])
    torch.testing.assert_close(weights.energy(), expected)
    weights.multiply(torch.tensor([0.0, 0.5]))
    weights.multiply_bias(torch.tensor([0.0, 0.5]))
    assert torch.equal(leaf.weight, torch.where(where[0], 0.0, torch.where(where[1], 0.5 * before, before)))
    factors = torch.ones(len(bias))
    if not inputs:
        factors[index[0]], factors[index[1]] = 0.0, 0.5
    assert torch.equal(leaf.bias, bias * factors)


def test_units_are_copied_and_no_others():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    net = lift(nn.Sequential(*layers).eval(), [(1, 3, 6, 6)])
    nn.init.uniform_(net.module.get_submodule("1").bias)
    index = next(s.index for s in analyse(net).group("0").slots if s.target == "1")
    other = net.copy()
    mine, theirs = (n.module.get_submodule("1") for n in (net, other))
    weights = UnitWeights(mine, False, index)
    weights.multiply(torch.zeros(8))
    weights.multiply_bias(torch.zeros(8))
    assert not mine.weight.any()
    units = torch.arange(8) % 3 == 0
    weights.copy(UnitWeights(theirs, False, index), units)
    assert torch.equal(mine.weight, torch.where(units, theirs.weight, 0.0))
    assert torch.equal(mine.bias, torch.where(units, theirs.bias, 0.0))
