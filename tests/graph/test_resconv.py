"""Factors and shortcuts written into plain networks: nothing changes until they do, and then layers can go."""

import functools

import onnx
import pytest
import torch
from cifar import lifted
from folding import assert_folds, kinds, network
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import PIECES, Composed
from support import cut_error, random_keep, relative_error
from torch import nn
from torch.nn import functional as F

from edgeprune.deploy.export import to_onnx
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.fold import fold
from edgeprune.graph.network import check
from edgeprune.graph.resconv import absorb_factors, factors, instrument, refusals
from edgeprune.graph.surgery import remove
from edgeprune.nn import ResConv2d


class Vgg(nn.Module):
    """Plain: with and without batch norm, dilated, grouped, depthwise, pooled in between, a linear behind a flatten."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.same_norm = nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 1)
        self.wider = nn.Conv2d(8, 12, 3, padding=1)
        self.dilated = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12 * 4, 5)
        self.phi = activation()

    def forward(self, x):
        x = self.phi(self.stem_norm(self.stem(x)))
        x = self.phi(self.same_norm(self.same(x)))
        x = F.max_pool2d(self.phi(self.bare(x)), 2)
        x = self.phi(self.wider(x))
        x = self.phi(self.dilated(x))
        x = F.avg_pool2d(self.phi(self.depthwise_norm(self.depthwise(x))), 2)
        return self.head(x.flatten(1))


LAYERS = ["same", "bare", "dilated", "depthwise"]


@functools.cache
def vgg(activation=nn.ReLU):
    """The same object every time: not to be changed."""
    return network(Vgg(activation), 3, 8, 8)


def with_factors(net, m=0.7, lam=0.9):
    """A copy of an instrumented network with other factors than those it starts with."""
    net = net.copy()
    with torch.no_grad():
        for i, factor in enumerate(factors(net)):
            net.module.get_parameter(factor.lam).fill_(lam + 0.05 * i)
            if factor.m is not None:
                net.module.get_parameter(factor.m).fill_(m - 0.1 * i)
    return net


def outputs(net, batch=3):
    with torch.no_grad():
        return net.module(*net.random_inputs(batch))


def operators(net):
    """How many nodes of each operator the exported file has."""
    model = to_onnx(fold(net))
    onnx.checker.check_model(model)
    names = [n.op_type for n in model.graph.node]
    return {name: names.count(name) for name in sorted(set(names))}


def test_nothing_changes_until_the_factors_do():
    net = vgg()
    before = str(net.module.graph)
    new = instrument(net)
    check(new)
    assert torch.equal(outputs(new), outputs(net))
    assert str(net.module.graph) == before
    assert [f.block for f in factors(new)] == LAYERS
    assert [f.leaf for f in factors(new)] == ["same_norm", "bare", "dilated", "depthwise_norm"]
    assert [b.name for b in find_blocks(new)] == LAYERS
    assert operators(new) == operators(net)
    assert not torch.equal(outputs(with_factors(new)), outputs(net))


def test_instrumented_networks_fold_to_as_many_kernels_as_plain_ones():
    net = with_factors(instrument(vgg()))
    folded = assert_folds(net)
    assert kinds(folded) == kinds(fold(vgg()))
    assert relative_error(outputs(folded), outputs(net)) <= 1e-5


@settings(max_examples=4, deadline=None)
@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4), st.integers(0, 10**6))
def test_any_composition_can_be_instrumented(names, seed):
    net = network(Composed(names, seed), 3, 16, 16, seed=seed)
    new = instrument(net)
    assert torch.equal(outputs(new), outputs(net))
    changed = with_factors(new)
    assert relative_error(outputs(assert_folds(changed, 1e-4)), outputs(changed)) <= 1e-4
    assert relative_error(outputs(absorb_factors(changed)), outputs(changed)) <= 1e-4
    channels = analyse(changed)
    assert cut_error(changed, channels, random_keep(channels, seed)) <= 1e-4
    removed = remove(changed, find_blocks(changed))
    assert relative_error(outputs(assert_folds(removed, 1e-4)), outputs(removed)) <= 1e-4


def test_instrumenting_twice_adds_nothing():
    once = instrument(vgg())
    assert str(instrument(once).module.graph) == str(once.module.graph)
    cifar = instrument(lifted(20))
    assert str(instrument(cifar).module.graph) == str(cifar.module.graph)


@pytest.mark.parametrize("seed", range(4))
def test_channels_of_an_instrumented_network_can_be_cut(seed):
    net = with_factors(instrument(vgg()))
    channels = analyse(net)
    assert {g.name for g in channels.groups} == {"stem", "wider"}  # a shortcut ties a layer's channels to its input's
    assert cut_error(net, channels, random_keep(channels, seed)) <= 1e-5


@pytest.mark.parametrize("names", [["same"], ["bare"], ["dilated"], ["depthwise"], ["same", "bare"], LAYERS])
def test_a_removed_layer_is_gone_from_the_file(names):
    """Against the network with lam at zero: its convolutions run and give nothing."""
    net = with_factors(instrument(vgg()))
    blocks = [b for b in find_blocks(net) if b.name in names]
    removed = remove(net, blocks)
    zero = net.copy()
    with torch.no_grad():
        for factor in factors(zero):
            if factor.block in names:
                zero.module.get_parameter(factor.lam).zero_()
    assert torch.equal(outputs(removed), outputs(zero))
    assert relative_error(outputs(assert_folds(removed)), outputs(removed)) <= 1e-5
    before, after = operators(net), operators(removed)
    assert after["Conv"] == before["Conv"] - len(names)
    assert after["Relu"] == before["Relu"] - len(names)
    assert {k: v for k, v in after.items() if k not in ("Conv", "Relu")} == {
        k: v for k, v in before.items() if k not in ("Conv", "Relu")
    }


def test_a_shortcut_of_exactly_one_costs_no_rounding():
    net = with_factors(instrument(vgg()), m=1.0)
    with torch.no_grad():
        for factor in factors(net):
            net.module.get_parameter(factor.m).fill_(1.0)
    removed = remove(net, find_blocks(net))
    plain = fold(removed)
    assert torch.equal(plain.module.get_parameter("head.weight"), removed.module.get_parameter("head.weight"))
    assert relative_error(outputs(plain), outputs(removed)) <= 1e-6


def test_other_activations_keep_what_is_left_exact():
    net = with_factors(instrument(vgg(nn.SiLU)))
    removed = remove(net, [b for b in find_blocks(net) if b.name == "bare"])
    folded = assert_folds(removed)
    assert kinds(folded).count("silu.default") == kinds(fold(net)).count("silu.default")
    assert "mul.Tensor" in kinds(folded)
    assert relative_error(outputs(folded), outputs(removed)) <= 1e-5


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.even = nn.Conv2d(4, 4, 4, padding=3, dilation=2)
        self.valid = nn.Conv2d(4, 4, 3)
        self.strided = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.split = nn.Conv2d(4, 4, 3, padding=1)
        self.split_norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.tied_a, self.tied_b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.tied_b.weight = self.tied_a.weight
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.dropped = nn.Conv2d(4, 4, 3, padding=1)
        self.dropout, self.dropped_norm = nn.Dropout(0.5), nn.BatchNorm2d(4)
        self.wider = nn.Conv2d(4, 6, 1)

    def forward(self, x):
        x = F.relu(self.valid(F.relu(self.even(F.relu(self.first(x))))))
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.strided(x))))))
        x = self.split(x)
        x = F.relu(self.split_norm(x)) * torch.sigmoid(x)
        x = F.relu(self.tied_b(F.relu(self.tied_a(F.relu(self.up(x))))))
        x = F.relu(x + self.branch(x))
        return self.wider(F.relu(self.dropped_norm(self.dropout(self.dropped(x)))))


def test_what_is_refused_and_why():
    net = network(Refused(), 4, 12, 12)
    reasons = refusals(net)
    expected = {
        "first": "input", "even": "even kernel", "valid": "size of the map", "strided": "stride 2", "twice": "once",
        "split": "batch norm and by others", "up": "transposed", "tied_a": "shares", "tied_b": "shares",
        "branch": "residual branch branch", "wider": "4 to 6",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for path, words in expected.items():
        assert words in reasons[path], path
    new = instrument(net)
    assert torch.equal(outputs(new), outputs(net))
    assert {f.block: (f.m, f.leaf) for f in factors(new)} == {
        "branch": (None, "branch"), "dropped": ("dropped_res.m", "dropped_norm"),
    }  # fmt: skip
    assert relative_error(outputs(assert_folds(with_factors(new))), outputs(with_factors(new))) <= 1e-5


@pytest.mark.parametrize("projection", [False, True])
def test_residual_branches_get_one_factor_each(projection):
    net = lifted(20, projection)
    new = instrument(net)
    found = factors(new)
    assert [f.block for f in found] == [b.name for b in find_blocks(net)]
    assert len(found) == 9
    assert all(f.m is None and f.leaf == f"{f.block}.bn2" for f in found)
    assert torch.equal(outputs(new), outputs(net))
    assert operators(new) == operators(net)
    changed = with_factors(new)
    assert relative_error(outputs(fold(changed)), outputs(changed)) <= 1e-5


def test_a_long_shortcut_does_not_hide_the_layers_below_it():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3, padding=1)
            self.body = nn.Sequential(*(m for _ in range(7) for m in (nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())))

        def forward(self, x):
            x = F.relu(self.stem(x))
            return x + self.body(x)

    net = network(Body(), 3, 6, 6)
    assert len(find_blocks(net)) == 1
    assert [f.block for f in factors(instrument(net))] == [f"body.{2 * i}" for i in range(7)]


@pytest.mark.parametrize("training", [False, True])
def test_factors_go_into_norms_and_convolutions(training):
    net = with_factors(instrument(vgg()))
    new = absorb_factors(net)
    assert not factors(new)
    assert [b.name for b in find_blocks(new)] == LAYERS  # the shortcuts are still there
    for module in (net.module, new.module):
        module.train(training)
    assert relative_error(outputs(new), outputs(net)) <= 1e-5


def test_a_network_with_shortcuts_alone_gets_its_factors_again():
    start = absorb_factors(instrument(vgg()))
    again = instrument(start)
    assert torch.equal(outputs(again), outputs(start))
    assert [(f.block, f.m) for f in factors(again)] == [(name, f"{name}_res.m") for name in LAYERS]
    trained = absorb_factors(with_factors(again))
    assert [n.name for n in trained.module.graph.nodes] == [n.name for n in start.module.graph.nodes]
    assert trained.module.state_dict().keys() == start.module.state_dict().keys()


def test_absorbing_gives_residual_networks_their_own_graph_back():
    net = lifted(20)
    new = absorb_factors(with_factors(instrument(net)))
    assert [n.name for n in new.module.graph.nodes] == [n.name for n in net.module.graph.nodes]


def test_a_norm_without_parameters_gets_some():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False),
                nn.ReLU(), nn.Conv2d(4, 2, 1),
            )  # fmt: skip

    net = with_factors(instrument(network(Net(), 3, 6, 6)))
    new = absorb_factors(net)
    assert not factors(new)
    assert relative_error(outputs(new), outputs(net)) <= 1e-6


def test_layers_made_to_be_removed_are_found():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), *(ResConv2d(8, activation=nn.ReLU()) for _ in range(3)))
    net = network(layers, 3, 8, 8)
    assert [f.block for f in factors(net)] == ["1.conv", "2.conv", "3.conv"]
    assert [f.leaf for f in factors(net)] == ["1.norm", "2.norm", "3.norm"]
    assert str(instrument(net).module.graph) == str(net.module.graph)
    before, after = operators(net), operators(remove(net, find_blocks(net)[1:]))
    assert (before["Conv"], after["Conv"]) == (4, 2)
    assert not {"Add", "Mul"} & before.keys()
    assert not {"Add", "Mul"} & after.keys()
