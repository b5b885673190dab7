"""Factors that move into weights and clamps that go: what is left of removed layers, and the like."""

import pytest
import torch
from folding import assert_folds, kinds, network
from torch import nn
from torch.nn import functional as F


class Between(nn.Module):
    """``part`` between one convolution with a relu and what reads it."""

    def __init__(self, part, read="conv", m=0.6):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.part, self.read = part, read
        self.m = nn.Parameter(torch.tensor(m) if not isinstance(m, torch.Tensor) else m)
        self.conv = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.other = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6 * 64, 3)
        self.features = nn.Linear(6, 3)

    def forward(self, x):
        x = self.part(self.m, F.relu(self.first(x)))
        return getattr(self, f"read_{self.read}")(x)

    def read_conv(self, x):
        return self.conv(x)

    def read_branches(self, x):
        return self.conv(x), self.other(x), self.up(x)

    def read_flat(self, x):
        return self.linear(x.flatten(1))

    def read_pooled(self, x):
        return self.features(F.max_pool2d(F.relu(x), 2).mean((2, 3)))

    def read_twice_called(self, x):
        return self.other(x) + self.other(F.sigmoid(x))

    def read_sum(self, x):
        return F.relu(x + self.norm(self.other(F.relu(self.norm(self.other(x))))))

    def read_output(self, x):
        return x


def left(m, x):
    """What is left of a removed layer."""
    return F.relu(m * x)


CHANNELS = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.1, 3.0]).reshape(6, 1, 1)


@pytest.mark.parametrize("m", [0.6, 1.0, 0.0, 2.5, CHANNELS])
@pytest.mark.parametrize("read", ["conv", "branches", "flat", "pooled", "twice_called"])
def test_a_factor_goes_into_every_reader(read, m):
    """Or, where a reader cannot take it, back into the convolution in front."""
    found = kinds(assert_folds(network(Between(left, read, m), 3, 8, 8)))
    assert found.count("mul.Tensor") == 0
    assert found.count("relu.default") == 1


def test_a_factor_that_not_all_readers_take_goes_back_to_where_the_value_was_made():
    net = network(Between(left, "sum"), 3, 8, 8)
    folded = assert_folds(net)
    assert "mul.Tensor" not in kinds(folded)
    assert kinds(folded).count("relu.default") == 3
    first, before = folded.module.get_parameter("first.weight"), net.module.get_parameter("first.weight")
    assert torch.allclose(first, 0.6 * before)


def test_a_factor_that_nobody_can_take_stays():
    def forked(m, x):
        return torch.cat([F.silu(m * x), x], 1)[:, :6]

    assert kinds(assert_folds(network(Between(forked), 3, 8, 8))).count("mul.Tensor") == 1


@pytest.mark.parametrize("m", [-0.5, CHANNELS - 0.2])
def test_a_negative_factor_keeps_its_relu(m):
    """relu(m * x) of x >= 0 is zero for m < 0: nothing there may be taken for the identity."""
    found = kinds(assert_folds(network(Between(left, "branches", m), 3, 8, 8)))
    assert found.count("relu.default") == 2


def test_a_negative_factor_passes_averages():
    folded = assert_folds(network(Between(lambda m, x: F.avg_pool2d(m * x, 3, 1, 1), "conv", -2.0), 3, 8, 8))
    assert kinds(folded) == ["Conv2d", "relu.default", "avg_pool2d.default", "Conv2d"]


@pytest.mark.parametrize(("m", "goes"), [(1.0, True), (0.4, True), (1.01, False), (3.0, False)])
def test_relu6_goes_up_to_a_factor_of_one(m, goes):
    folded = assert_folds(network(Between(lambda m, x: F.relu6(m * F.relu6(x)), "conv", m), 3, 8, 8))
    assert kinds(folded).count("relu6.default") == (1 if goes else 2)
    assert kinds(folded).count("mul.Tensor") == 0 if goes else True


@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.hardswish, torch.sigmoid])
def test_other_activations_stay(activation):
    folded = assert_folds(network(Between(lambda m, x: activation(m * x)), 3, 8, 8))
    assert kinds(folded)[-2].startswith(activation.__name__)


def test_several_removed_layers_in_a_row():
    def row(m, x):
        for factor in (0.5, 3.0, 0.7):
            x = F.relu(factor * (m * x))
        return F.max_pool2d(x, 2)

    folded = assert_folds(network(Between(row, "pooled"), 3, 8, 8))
    found = kinds(folded)
    assert found.count("mul.Tensor") == 0
    assert found.count("relu.default") == 1


def test_a_scaled_input_goes_into_the_first_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.scale = nn.Parameter(torch.rand(1, 3, 1, 1))

        def forward(self, x):
            return F.relu(self.conv(x / 255 * self.scale))

    assert kinds(assert_folds(network(Net(), 3, 8, 8))) == ["Conv2d", "relu.default"]


def test_a_row_factor_is_no_channel_factor():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.row = nn.Parameter(torch.rand(4))  # the map is four wide and has four channels

        def forward(self, x):
            return self.conv(F.relu(x) * self.row)

    assert kinds(assert_folds(network(Net(), 4, 4, 4))).count("mul.Tensor") == 1


def test_a_factor_that_broadcasts_stays():
    """One channel becomes four by multiplying: that is no scaling of what was there."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.scale = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x):
            return self.conv(F.relu(x) * self.scale)

    assert kinds(assert_folds(network(Net(), 1, 4, 4))).count("mul.Tensor") == 1
