"""Cut networks against the masked original: every operator, random compositions, and an independent check by hand."""

import copy
import random

import pytest
import torch
from cifar import lifted, models
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import PIECES, Composed, Tied
from support import cut_error, random_keep, randomise_norms, relative_error
from torch import nn

from edgeprune.errors import UsageError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.network import check, shapes
from edgeprune.graph.surgery import cut, remove

TOLERANCE = 1e-5


def composed(names, seed=0, flatten=True):
    network = lift(randomise_norms(Composed(names, seed, flatten), seed).eval(), [(1, 3, 16, 16)])
    return network, analyse(network)


@pytest.mark.parametrize("name", list(PIECES))
def test_cut_equals_masked_for_every_operator(name):
    network, channels = composed(["plain", name, "plain"], 1)
    assert "body.0" in {g.name for g in channels.groups}
    assert channels.unknown_ops == ()
    inputs = network.random_inputs(2)
    with torch.no_grad():
        whole = network.module(*inputs)
        assert relative_error(cut(network, channels, random_keep(channels, 0)).module(*inputs), whole) > 1e-2
    assert max(cut_error(network, channels, random_keep(channels, s), s) for s in range(3)) <= TOLERANCE


def random_names(seed):
    r = random.Random(seed)
    return r.choices(list(PIECES), k=r.randint(2, 6)), r.random() < 0.5


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_cut_equals_masked_for_random_networks(seed):
    names, flatten = random_names(seed)
    network, channels = composed(names, seed, flatten)
    assert cut_error(network, channels, random_keep(channels, seed), seed) <= TOLERANCE, names


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10**9))
def test_cut_equals_masked_for_many_random_networks(seed):
    names, flatten = random_names(seed)
    network, channels = composed(names, seed, flatten)
    assert max(cut_error(network, channels, random_keep(channels, s), s) for s in (0, 1)) <= TOLERANCE, names


class ReluNet(nn.Module):
    """No norm and no sigmoid: a filter of zeros gives a channel of zeros, whatever follows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.branch = nn.Conv2d(12, 6, 1)
        self.body = nn.Conv2d(18, 18, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(18, 8, 2, 2)
        self.out = nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4 * 16 * 16, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.stem(x))))
        x = torch.cat([torch.relu(self.branch(x)), torch.max_pool2d(x, 3, 1, 1)], 1)
        x = torch.relu(self.body(x)) + x
        x = torch.pixel_shuffle(torch.relu(self.up(x[:, :, ::2, ::2])), 2)
        return self.head(torch.relu(self.out(x[:, :, ::2, ::2])).flatten(1))


@pytest.mark.parametrize("seed", range(4))
def test_cut_equals_filters_zeroed_by_hand(seed):
    model = ReluNet().eval()
    network = lift(model, [(1, 3, 16, 16)])
    channels = analyse(network)
    assert {g.name: g.size for g in channels.groups} == {
        "stem": 4, "grouped": 6, "branch": 6, "up": 2, "out": 4
    }  # fmt: skip
    keep = random_keep(channels, seed, 0.5)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for group in channels.groups:
            gone = [u for u in range(group.size) if u not in keep[group.name]]
            for slot in group.slots:
                if slot.role == "out":
                    layer = zeroed.get_submodule(slot.target)
                    index = torch.from_numpy(slot.index[gone].ravel())
                    layer.bias[index] = 0
                    filters = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
                    filters[index] = 0
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        assert relative_error(cut(network, channels, keep).module(x), zeroed(x)) <= TOLERANCE


def test_order_of_the_kept_units_does_not_matter_and_groups_not_named_stay_whole():
    network, channels = composed(["residual", "concat"])
    first, other = channels.groups[0], channels.groups[1]
    small = cut(network, channels, {first.name: [3, 0, 2]})
    same = cut(network, channels, {first.name: [0, 2, 3]})
    inputs = network.random_inputs(2)
    with torch.no_grad():
        assert torch.equal(small.module(*inputs), same.module(*inputs))
    assert small.module.get_submodule(first.name).out_channels == 3
    assert small.module.get_submodule(other.name).out_channels == other.size


def test_the_original_is_left_alone_and_an_empty_cut_is_a_copy():
    network, channels = composed(["squeeze_excite", "split"])
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    code = network.module.code
    cut(network, channels, random_keep(channels, 0, 0.5))
    assert network.module.code == code
    for name, value in network.module.state_dict().items():
        assert torch.equal(value, before[name])
    same = cut(network, channels, {})
    inputs = network.random_inputs(2)
    with torch.no_grad():
        assert torch.equal(same.module(*inputs), network.module(*inputs))
    assert not {id(p) for p in same.module.parameters()} & {id(p) for p in network.module.parameters()}


def test_names_of_nodes_and_modules_survive():
    network, channels = composed(["residual", "split", "shuffle", "channels_last"])
    small = cut(network, channels, random_keep(channels, 0, 0.5))
    check(small)
    assert [n.name for n in small.module.graph.nodes] == [n.name for n in network.module.graph.nodes]
    assert set(small.module.state_dict()) == set(network.module.state_dict())
    again = analyse(small)
    assert [g.name for g in again.groups] == [g.name for g in channels.groups if g.size // 2 > 1]


def test_a_cut_network_is_analysed_and_cut_again():
    network, channels = composed(["grouped", "split", "zero_padding", "group_norm"], 3)
    small = cut(network, channels, random_keep(channels, 0, 0.6))
    assert cut_error(small, analyse(small), random_keep(analyse(small), 1)) <= TOLERANCE


def test_a_shared_parameter_is_cut_once_and_stays_shared():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Tied(8, 6), nn.Conv2d(6, 2, 1)).eval()
    network = lift(model, [(1, 3, 16, 16)])
    channels = analyse(network)
    small = cut(network, channels, random_keep(channels, 0, 0.5))
    convs = [m for m in small.module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and
             m.in_channels == 4]  # fmt: skip
    assert len(convs) == 2
    assert convs[0].weight is convs[1].weight
    assert convs[0].weight.shape == (3, 4, 3, 3)


def test_a_weight_that_is_also_used_bare_stays_whole():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 6), nn.Linear(8, 2)

        def forward(self, x):
            y = torch.relu(self.stem(x)).mean((2, 3))
            return self.head(torch.relu(self.inner(y)) @ self.inner.weight + y)

    network = lift(Autoencoder().eval(), [(1, 3, 16, 16)])
    channels = analyse(network)
    assert channels.groups == ()
    assert cut_error(network, channels, {}) == 0


def test_a_cut_network_trains_and_takes_any_batch():
    network, channels = composed(["depthwise", "residual"], flatten=False)
    small = cut(network, channels, random_keep(channels, 0, 0.5)).module
    assert all(p.requires_grad for p in small.parameters())
    small.train()
    small(torch.randn(3, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_refused_selections():
    network, channels = composed(["plain"])
    with pytest.raises(UsageError, match="at least 1 of"):
        cut(network, channels, {channels.groups[0].name: []})


@pytest.mark.parametrize("projection", [False, True])
def test_blocks_come_out_of_a_cut_network(projection):
    network = lifted(20, projection)
    channels, blocks = analyse(network), find_blocks(network)
    small = cut(network, channels, random_keep(channels, 0, 0.5))
    gone = [b for b in blocks if b.name in ("layer1.1", "layer1.2", "layer2.0", "layer3.2")]
    short = remove(small, gone)
    dead = frozenset().union(*(b.nodes for b in gone))
    names = [n.name for n in short.module.graph.nodes]
    assert set(names) == {n.name for n in network.module.graph.nodes} - dead
    assert not [n for n, _ in short.module.named_parameters() if n.startswith(("layer1.1.", "layer1.2.", "layer3.2."))]
    sizes = shapes(small)
    assert all(size == sizes[name] for name, size in shapes(short).items())
    assert len(small.module.state_dict()) > len(short.module.state_dict())


def test_removing_blocks_equals_the_network_built_without_them():
    network = lifted(20)
    model = models.CifarResNet(3).eval()
    model.load_state_dict(network.module.state_dict(), strict=True)
    gone = [b for b in find_blocks(network) if b.name in ("layer1.1", "layer1.2", "layer3.1")]
    assert len(gone) == 3
    model.layer1 = model.layer1[:1]
    model.layer3 = nn.Sequential(model.layer3[0], model.layer3[2])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # each block ends in a relu, and a relu of a relu changes nothing
        assert relative_error(remove(network, gone).module(x), model(x)) <= 1e-6
