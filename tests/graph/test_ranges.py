"""Bounds of values, against the values themselves."""

import math

import torch
from folding import network, values
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import PIECES, Composed
from torch import nn
from torch.nn import functional as F

from edgeprune.graph.ranges import ANY, clamp_of, ranges


def bounds(module, *shape):
    net = network(module, *shape)
    return net, {node.name: r for node, r in ranges(net.module).items()}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.factor = nn.Parameter(torch.tensor([-2.0, 0.5, 3.0]).reshape(3, 1, 1))

    def forward(self, x):
        return self.function(self, x)


def of(function):
    """The bounds of the output of a function of (module, x of shape (N, 3, 6, 6))."""
    net, found = bounds(Function(function), 3, 6, 6)
    return found[str(net.module.graph.output_node().args[0])]


def test_known_bounds():
    inf = math.inf
    assert of(lambda m, x: F.relu(x)) == (0, inf)
    assert of(lambda m, x: F.relu6(x)) == (0, 6)
    assert of(lambda m, x: F.hardtanh(x, -3, 2)) == (-3, 2)
    assert of(lambda m, x: F.relu6(x) * 0.5 + 1) == (1, 4)
    assert of(lambda m, x: F.relu6(x) * m.factor) == (-12, 18)
    assert of(lambda m, x: F.relu(x) * m.factor) == (-inf, inf)
    assert of(lambda m, x: F.relu(x) * 0) == (0, 0)
    assert of(lambda m, x: torch.cat([F.relu6(x), torch.tanh(x)], 1)) == (-1, 6)
    assert of(lambda m, x: F.pad(F.relu6(x) + 1, (1, 1))) == (0, 7)
    assert of(lambda m, x: F.pad(F.relu6(x) + 1, (1, 1), value=9.0)) == (1, 9)
    assert of(lambda m, x: F.max_pool2d(torch.sigmoid(x), 2).flatten(1)) == (0, 1)
    assert of(lambda m, x: F.avg_pool2d(torch.sigmoid(x), 2)) == (0, inf)
    assert of(lambda m, x: F.avg_pool2d(torch.tanh(x), 2)) == ANY
    assert of(lambda m, x: torch.add(F.relu(x), torch.sigmoid(x), alpha=-1)) == (-1, inf)
    assert of(lambda m, x: x.clamp(max=4).clamp_min(1)) == (1, 4)
    assert of(lambda m, x: x * x) == ANY  # says nothing, rather than something wrong


def test_only_pure_clamps_are_clamps():
    net, _ = bounds(Function(lambda m, x: F.leaky_relu(F.hardswish(F.relu6(x.clamp(-1, 1))))), 3, 6, 6)
    found = [clamp_of(n) for n in net.module.graph.nodes if n.op == "call_function"]
    assert [c for c in found if c is not None] == [(-1, 1), (0, 6)]


@settings(max_examples=6, deadline=None)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4), st.integers(0, 10**6))
def test_no_value_lies_outside_its_bounds(names, seed):
    net = network(Composed(names, seed), 3, 16, 16, seed=seed)
    found = {node.name: r for node, r in ranges(net.module).items()}
    told = 0
    for name, value in values(net).items():
        low, high = found[name]
        told += (low, high) != ANY
        assert low <= float(value.min())
        assert float(value.max()) <= high
    assert told
