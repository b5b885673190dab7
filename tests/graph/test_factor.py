"""Convolutions as chains of thinner ones: the same outputs at full rank, the right places, and what cannot be done."""

import itertools

import pytest
import torch
from support import cut_error, random_keep, randomise_norms, relative_error
from torch import nn

from edgeprune.errors import UsageError
from edgeprune.graph.channels import analyse
from edgeprune.graph.factor import Triple, by_weights, combined, factorable, factored, inner_layers, insert, merged
from edgeprune.graph.lift import lift
from edgeprune.graph.network import shapes
from edgeprune.plan.problem import Factoring

SIDES = {"inputs": (True, False), "outputs": (False, True), "both": (True, True)}


def all_of(network, layer, sides):
    leaf = network.module.get_submodule(layer)
    full = (tuple(range(leaf.in_channels)), tuple(range(leaf.out_channels)))
    return Factoring(layer, *(kept if side else None for kept, side in zip(full, sides, strict=True)))


def outputs(network, seed=0, batch=3):
    with torch.no_grad():
        return network.module(*network.random_inputs(batch, seed))


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "bias"),
    [(1, 0, 1, True), (2, 1, 1, False), (1, (2, 0), 2, True), ((1, 2), 3, (1, 2), False)],
)
def test_at_full_rank_it_is_the_layer(sides, stride, padding, dilation, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, (3, 2), stride, padding, dilation, bias=bias)
    network = lift(nn.Sequential(nn.Conv2d(3, 5, 1), conv, nn.ReLU(), nn.Conv2d(7, 2, 1)).eval(), [(1, 3, 11, 12)])
    thin = factored(network, [all_of(network, "1", sides)])
    assert relative_error(outputs(thin), outputs(network)) < 1e-5
    assert len(list(thin.modules_called())) == 3 + sum(sides)


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_of_one_and_three_dimensions(kind, sides):
    torch.manual_seed(0)
    rank = 1 if kind is nn.Conv1d else 3
    network = lift(nn.Sequential(kind(3, 4, 3, padding=1), nn.ReLU()).eval(), [(1, 3, *(6,) * rank)])
    thin = factored(network, [all_of(network, "0", sides)])
    assert relative_error(outputs(thin), outputs(network)) < 1e-5


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_a_1x1_in_front_of_other_paddings(mode):
    torch.manual_seed(0)
    network = lift(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval(), [(1, 3, 8, 8)])
    leaf = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    network.module.add_module("0", leaf)
    thin = factored(network, [all_of(network, "0", (True, True))])
    assert relative_error(outputs(thin), outputs(network)) < 1e-5


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_exact_combinations_leave_the_outputs_alone(side):
    """Filters 1 and 4 (slices 0 and 3) are mixtures of the others; what is kept is told in a scrambled order."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1, stride=2)
    gone, kept = ((1, 4), (5, 0, 3, 2)) if side == "outputs" else ((0, 3), (4, 1, 5, 2))
    with torch.no_grad():
        units = conv.weight if side == "outputs" else conv.weight.transpose(0, 1)
        for unit in gone:
            units[unit] = torch.einsum("k,k...->...", torch.randn(4), units[list(kept)])
    network = lift(nn.Sequential(conv, nn.ReLU()).eval(), [(1, 6, 9, 9)])
    for order in (kept, tuple(sorted(kept))):
        thin = factored(network, [Factoring("0", **{side: order})])
        assert relative_error(outputs(thin), outputs(network)) < 1e-5
    inner = thin.module.get_submodule("0_core" if side == "outputs" else "0_in")
    assert inner.out_channels == 4
    assert inner.bias is None


def test_names_stay_and_inner_channels_are_a_group_like_any_other():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3))
    network = lift(randomise_norms(block).eval(), [(1, 4, 8, 8)])
    thin = factored(network, [Factoring("0", outputs=(0, 2, 3, 5, 7)), Factoring("3", (1, 2, 5), (0, 1))])
    before, after = shapes(network), shapes(thin)
    assert {name: after.get(name) for name in before} == before
    assert {g.name: g.size for g in analyse(thin).groups} == {"0": 8, "0_core": 5, "3_in": 3, "3_core": 2}
    assert inner_layers(thin, Factoring("3", (0,), (0,))) == {"in": "3_in", "core": "3_core", "out": "3"}
    assert inner_layers(thin, Factoring("0", None, (0,))) == {"core": "0_core", "out": "0"}
    assert inner_layers(thin, Factoring("9", None, (0,))) is None
    channels = analyse(thin)
    assert all(cut_error(thin, channels, random_keep(channels, seed)) < 1e-5 for seed in range(3))


def test_a_layer_called_twice_becomes_two_chains_of_the_same_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    torch.manual_seed(0)
    network = lift(Twice().eval(), [(1, 4, 6, 6)])
    full = tuple(range(4))
    thin = insert(network, {"conv": by_weights(network.module.conv, Factoring("conv", full, full))})
    assert relative_error(outputs(thin), outputs(network)) < 1e-5
    assert {len(nodes) for nodes in thin.modules_called().values()} == {2}


def test_the_multiplied_out_kernel_is_the_oracle():
    torch.manual_seed(0)
    network = lift(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval(), [(1, 3, 9, 9)])
    factorings = [Factoring("0", outputs=(1, 4)), Factoring("2", (0, 1, 3), (2, 4))]
    thin = factored(network, factorings)
    assert relative_error(outputs(thin), outputs(merged(thin, network, factorings))) < 1e-5
    assert relative_error(outputs(thin), outputs(network)) > 0.05
    wrong = thin.copy()
    with torch.no_grad():
        wrong.module.get_submodule("2_core").weight.mul_(1.1)
    assert relative_error(outputs(wrong), outputs(merged(thin, network, factorings))) > 1e-2


def test_the_kernel_of_a_triple_by_loops():
    torch.manual_seed(0)
    triple = Triple(torch.randn(2, 3, 2, 2), torch.randn(3, 4), torch.randn(5, 2))
    found = triple.composed()
    assert found.shape == (5, 4, 2, 2)
    for m, n in itertools.product(range(5), range(4)):
        parts = [triple.out[m, i] * triple.core[i, c] * triple.into[c, n] for i in range(2) for c in range(3)]
        torch.testing.assert_close(found[m, n], sum(parts))


def test_more_units_than_dimensions_give_no_nan():
    rows = torch.randn(8, 3)
    rows[5] = 0
    found = combined(rows, [0, 5, 1, 2, 3, 4])
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found @ rows[[0, 5, 1, 2, 3, 4]].double(), rows.double())
    assert bool(combined(torch.zeros(4, 3), [1]).isfinite().all())


def test_what_can_be_factored():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.one, self.grouped = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2)
            self.turned, self.twice = nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.tied = nn.Conv2d(4, 4, 3, padding=1, dilation=1)
            self.other = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
            self.other.weight = self.tied.weight

        def forward(self, x):
            x = self.turned(self.grouped(self.one(self.plain(x))))
            return self.other(torch.relu(self.tied(torch.relu(self.twice(torch.relu(self.twice(x)))))))

    network = lift(Net().eval(), [(1, 4, 12, 12)])
    assert factorable(network) == ["plain"]
    for factoring in (
        Factoring("one", (0,)), Factoring("nothing", (0,)), Factoring("plain", (0, 0)), Factoring("plain", (4,)),
        Factoring("plain", None, ()),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="the plan"):
            factored(network, [factoring])
