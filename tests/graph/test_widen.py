"""Widening gives the same outputs, room to learn, and is undone by a cut; for every operator of the surgery tests."""

import numpy as np
import pytest
import torch
from pieces import PIECES, Composed
from support import randomise_norms, relative_error
from torch import nn

from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.network import check
from edgeprune.graph.ops import name_of
from edgeprune.graph.surgery import cut
from edgeprune.graph.widen import inner_groups, resize, widen

OVER_CHANNELS = {"channels_last"}  # pieces in which something looks at all channels alike


def composed(names):
    return lift(randomise_norms(Composed(names, 0, True), 0).eval(), [(1, 3, 16, 16)])


def _ignored(wide, group, unit):
    weights = [(wide.module.get_submodule(s.target), s.index[unit]) for s in group.slots if s.role == "in"]
    return bool(weights) and all(
        not (m.weight[i] if "Transpose" in type(m).__name__ else m.weight[:, i % m.weight.shape[1]]).any()
        for m, i in weights
    )


@pytest.mark.parametrize("name", list(PIECES))
def test_every_operator_widens_or_is_refused(name):
    network = composed(["plain", name, "plain"])
    groups = analyse(network).groups
    widths = {g.name: g.size + max(1, g.size // 2) for g in groups}
    calls = {name_of(n.target) for n in network.module.graph.nodes if n.op == "call_function"}
    if name in OVER_CHANNELS:
        assert "layer_norm" in calls
        with pytest.raises(UnsupportedModelError, match="changes its outputs"):
            widen(network, widths)
        return
    wide = widen(network, widths)
    check(wide)
    x = network.random_inputs(2, seed=5)
    with torch.no_grad():
        assert relative_error(wide.module(*x), network.module(*x)) < 1e-4
    assert sum(p.numel() for p in wide.module.parameters()) > 1.2 * sum(p.numel() for p in network.module.parameters())
    assert {g.name: g.size for g in analyse(wide).groups} == widths


class Small(nn.Module):
    """A residual trunk with a block and a bottleneck of a depthwise convolution, and a head of flattened maps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.norm, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1)
        self.up, self.dw, self.down = (
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.Conv2d(12, 8, 1),
        )
        self.last, self.head = nn.Conv2d(8, 5, 1), nn.Linear(5 * 16, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        x = x + self.down(torch.relu(self.dw(torch.relu(self.up(x)))))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(torch.relu(self.last(x)), 4).flatten(1))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return lift(randomise_norms(Small(), 0).eval(), [(1, 3, 8, 8)])


def test_inner_groups_are_those_with_one_producer(small):
    assert {g.name for g in inner_groups(analyse(small))} == {"a", "up", "last"}


def test_all_sizes_follow(small):
    wide = widen(small, {"a": 9, "up": 30, "last": 7})
    shapes = {k: tuple(v.shape) for k, v in wide.module.state_dict().items()}
    assert shapes["a.weight"] == (9, 8, 3, 3)
    assert shapes["norm.running_var"] == (9,)
    assert shapes["b.weight"] == (8, 9, 3, 3)
    assert shapes["dw.weight"] == (30, 1, 3, 3)
    assert wide.module.dw.groups == 30
    assert shapes["down.weight"] == (8, 30, 1, 1)
    assert shapes["head.weight"] == (4, 7 * 16)
    assert shapes["stem.weight"] == (8, 3, 3, 3)


def test_a_cut_undoes_it(small):
    """Without its copies the wide network is the old one, to the bit."""
    wide = widen(small, {"a": 9, "up": 30, "last": 7})
    channels = analyse(wide)
    keep = {}
    for group in inner_groups(channels):
        keep[group.name] = [u for u in range(group.size) if not _ignored(wide, group, u)]
    assert {n: len(k) for n, k in keep.items()} == {"a": 6, "up": 12, "last": 5}
    narrow = cut(wide, channels, keep)
    assert {k: tuple(v.shape) for k, v in narrow.module.state_dict().items()} == {
        k: tuple(v.shape) for k, v in small.module.state_dict().items()
    }
    for key, value in small.module.state_dict().items():
        assert torch.equal(narrow.module.state_dict()[key], value), key


def test_what_is_new_can_learn(small):
    """After one step the zeros are none any more; after two the new filters have moved."""
    wide = widen(small, {"a": 9})
    module = wide.module.train()
    fresh = [u for u in range(9) if not module.b.weight[:, u].any()]
    assert len(fresh) == 3
    before = module.a.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        module(torch.randn(8, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        assert module.b.weight[:, fresh].abs().sum((0, 2, 3)).min() > 0
        moved = (module.a.weight - before)[fresh].abs().amax((1, 2, 3))
        assert (moved > 0).all() == (step > 0)


def test_copies_differ_from_what_they_copy(small):
    wide = widen(small, {"a": 12})
    filters = wide.module.a.weight.flatten(1)
    distances = torch.cdist(filters, filters) + torch.eye(12) * 100
    assert distances.min() > 0.05 * filters.norm(dim=1).mean()


def test_a_norm_over_channels_is_in_the_way():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    network = lift(randomise_norms(Normed(), 0).eval(), [(1, 8)])
    with pytest.raises(UnsupportedModelError, match="changes its outputs"):
        widen(network, {"a": 12})


def test_what_cannot_be_widened(small):
    with pytest.raises(UsageError, match="6 units already"):
        widen(small, {"a": 5})
    with pytest.raises(UsageError, match="no channel group"):
        widen(small, {"b": 50})


def test_resize_goes_both_ways(small):
    other = resize(small, {"a": 4, "up": 14, "last": 5})
    sizes = {g.name: g.size for g in analyse(other).groups}
    assert (sizes["a"], sizes["up"], sizes["last"], sizes["stem"]) == (4, 14, 5, 8)
    np.testing.assert_array_equal(other.module.a.weight.detach(), small.module.a.weight[:4].detach())
