"""The oracle itself: what it holds at zero, and that norms see the kept channels only."""

import pytest
import torch
import torch.nn.functional as F
from pieces import Composed
from support import random_keep, randomise_norms
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.masking import masked_outputs


def test_keeping_everything_gives_the_original_to_the_bit_and_leaves_it_as_it_was():
    network = lift(randomise_norms(Composed(["residual", "channels_last", "split"])).eval(), [(1, 3, 16, 16)])
    channels = analyse(network)
    network.module.train()
    inputs = network.random_inputs(2)
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    masked_outputs(network, channels, random_keep(channels, 0), inputs)
    assert network.module.training
    assert all(torch.equal(v, before[k]) for k, v in network.module.state_dict().items())
    network.module.eval()
    everything = {g.name: range(g.size) for g in channels.groups}
    with torch.no_grad():
        assert torch.equal(masked_outputs(network, channels, everything, inputs)[0], network.module(*inputs))


def test_a_sigmoid_of_a_masked_channel_counts_as_zero():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1)).eval()
    network = lift(model, [(1, 3, 4, 4)])
    (x,) = network.random_inputs(2)
    (actual,) = masked_outputs(network, analyse(network), {"0": [1, 3]}, [x])
    with torch.no_grad():
        hidden = torch.sigmoid(model[0](x))
        hidden[:, [0, 2]] = 0
        torch.testing.assert_close(actual, model[2](hidden))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_norms_take_their_statistics_over_the_kept_channels(groups):
    norm = nn.GroupNorm(groups, 6)
    model = randomise_norms(nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.Conv2d(6, 2, 1))).eval()
    network = lift(model, [(1, 3, 4, 4)])
    channels = analyse(network)
    group = channels.group("0")
    keep = [0] if groups == 2 else [0, 2]
    stays = sorted(group.slots[0].index[keep].ravel().tolist())
    (x,) = network.random_inputs(2)
    (actual,) = masked_outputs(network, channels, {"0": keep}, [x])
    with torch.no_grad():
        kept = model[0](x)[:, stays]
        kept = F.group_norm(kept, len(stays) if groups == 6 else groups, norm.weight[stays], norm.bias[stays])
        hidden = torch.zeros(2, 6, 4, 4)
        hidden[:, stays] = kept
        torch.testing.assert_close(actual, model[2](hidden))


def test_several_outputs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.a(x), self.b(x)

    network = lift(Heads().eval(), [(1, 3, 8, 8)])
    outputs = masked_outputs(network, analyse(network), {"stem": [2]}, network.random_inputs(3))
    assert [tuple(o.shape) for o in outputs] == [(3, 4, 6, 6), (3, 6, 6, 6)]
