"""Activations that stand behind a removed layer: named, with what they are worth."""

import pytest
import torch
from folding import network
from torch import nn
from torch.nn import functional as F

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.leftovers import lone_activations
from edgeprune.graph.resconv import factors, instrument
from edgeprune.graph.surgery import remove


class Net(nn.Module):
    def __init__(self, phi):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.head, self.phi = nn.Conv2d(4, 2, 1), phi

    def forward(self, x):
        x = self.phi(self.b(self.phi(self.a(x))))
        return self.head(self.phi(self.c(x)))


def without_b(phi, m):
    net = instrument(network(Net(phi), 3, 6, 6))
    for factor in factors(net):
        nn.init.constant_(net.module.get_parameter(factor.m), m)
    return net, remove(net, [b for b in find_blocks(net) if b.name == "b"])


@pytest.mark.parametrize(("phi", "m", "stays"), [
    (F.relu, 0.7, 0), (F.relu6, 0.7, 0), (F.relu6, 1.7, 1), (F.silu, 0.7, 1), (F.gelu, 1.0, 1), (F.relu, -0.5, 1),
])  # fmt: skip
def test_what_stays_is_named(phi, m, stays):
    whole, removed = without_b(phi, m)
    x = whole.random_inputs(4)
    assert len(lone_activations(removed, x)) == stays
    assert not lone_activations(whole, x)


def test_the_error_is_that_of_the_network_without_it():
    whole, removed = without_b(F.silu, 0.7)
    (x,) = whole.random_inputs(4)
    (error,) = lone_activations(removed, (x,)).values()
    model = Net(F.silu).eval()
    model.load_state_dict(whole.module.state_dict(), strict=False)
    with torch.no_grad():
        inner = 0.7 * F.silu(model.a(x))
        ends = [model.head(F.silu(model.c(y) + 0.7 * y)) for y in (F.silu(inner), inner)]
    expected = (ends[1] - ends[0]).square().sum() / ends[0].square().sum()
    assert error == pytest.approx(expected.item(), rel=1e-4)
    assert error > 1e-3
