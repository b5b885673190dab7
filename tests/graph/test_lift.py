"""Lifting: modules come back under their names, results stay equal, and what cannot be lifted stays a call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.lift import lift, lift_program
from edgeprune.graph.network import LEAVES, check, shapes

AUTO = torch.export.Dim.AUTO


def assert_lifts(module, shape=(1, 3, 8, 8), other=None):
    """The network equals the module at another batch (and another size, if one is given)."""
    network = lift(module, [shape])
    check(network)
    module = copy.deepcopy(module).eval()
    for sample in (shape[1:], other or shape[1:]):
        x = torch.randn(3, *sample)
        with torch.no_grad():
            assert relative_error(network.module(x), module(x)) < 1e-6
    return network


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.PReLU(8)
        self.group = nn.Conv2d(8, 8, 3, padding="same", groups=4, dilation=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.layer_norm = nn.GroupNorm(2, 6)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        y = self.up(self.group(y) + y)
        y = self.layer_norm(y) * self.scale
        return self.fc(self.drop(y.mean((2, 3))))


def test_modules_keep_their_paths_and_the_rest_are_calls():
    network = assert_lifts(Everything(), other=(3, 12, 12))
    called = network.modules_called()
    assert {"conv", "norm", "group", "up", "fc"} <= set(called)
    for path in called:
        assert isinstance(network.module.get_submodule(path), LEAVES)
    assert network.module.get_parameter("scale").shape == (6, 1, 1)
    assert network.module.get_submodule("group").padding == "same"


def test_gradients_reach_every_parameter_in_training_mode():
    network = lift(Everything(), [(1, 3, 8, 8)])
    network.module.train()
    network.module(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in network.module.parameters())
    assert network.module.get_submodule("norm").num_batches_tracked == 1


def test_a_shared_module_is_one_module_called_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    network = assert_lifts(Shared(), (1, 4, 6, 6))
    assert [len(calls) for calls in network.modules_called().values()] == [2]


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1)
            self.b = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    network = assert_lifts(Tied(), (1, 4, 6, 6))
    weights = [network.module.get_submodule(p).weight for p in network.modules_called()]
    assert weights[0] is weights[1]


def test_weights_that_are_computed_from_weights_become_plain():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.gain = nn.Parameter(torch.rand(6, 1, 1, 1))
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1))

        def forward(self, x):
            w = self.conv.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) * self.gain
            return self.normed(F.conv2d(x, w, self.conv.bias))

    network = assert_lifts(Standardised())
    assert all(n.op in ("placeholder", "call_module", "output") for n in network.module.graph.nodes)
    assert "normed" in network.modules_called()


def test_weights_that_depend_on_the_input_stay_a_call():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 8 * 3)

        def forward(self, x):
            w = self.fc(x.mean((0, 2, 3))).view(8, 3, 1, 1)
            return F.conv2d(x, w)

    network = lift(Dynamic(), [(1, 3, 8, 8)])
    assert list(network.modules_called()) == ["fc"]
    assert any(n.target is torch.ops.aten.conv2d.default for n in network.module.graph.nodes)


def test_writes_through_views_are_kept():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            y = F.relu(self.conv(x), inplace=True)
            part = y[:, :4]
            part.mul_(2.0)
            y[:, 4:, ::2] = 0.5
            y += 1
            return y

    assert_lifts(Writing(), other=(3, 10, 10))


def test_a_view_that_needs_contiguous_memory():
    class Shuffle(nn.Module):
        def forward(self, x):
            b, c, h, w = x.shape
            return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)

    assert_lifts(Shuffle(), (1, 6, 5, 5))


def test_contexts_are_put_in_line():
    class Contexts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            with torch.no_grad():
                y = F.relu(self.a(x))
                z = y + 1
            with torch.autocast("cpu", enabled=False):
                return self.b(y) * z

    network = assert_lifts(Contexts())
    assert set(network.modules_called()) == {"a", "b"}


def test_sizes_of_same_padding_become_fixed():
    """Their formulas would keep symbolic arithmetic busy for minutes."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, stride=2) for _ in range(4)])

        def forward(self, x):
            for conv in self.convs:
                h, w = (max((-(-s // 2) - 1) * 2 + 3 - s, 0) for s in x.shape[-2:])
                x = conv(F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2]))
            return x

    network = assert_lifts(Same(), (1, 3, 33, 33))
    assert not any(n.target is torch.ops.aten.sym_size.int for n in network.module.graph.nodes)


class Trainable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(F.relu(self.norm(self.conv(x))))


def test_training_mode_does_not_matter_and_is_left_as_it_was():
    module = Trainable().train()
    module.norm.eval()
    assert_lifts(module)
    assert module.training
    assert module.drop.training
    assert not module.norm.training


def test_a_program_exported_in_training_mode():
    module = Trainable().train()
    program = torch.export.export(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: AUTO},))
    network = lift_program(program)
    assert network.input_shapes == ((1, 3, 8, 8),)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(network.module(x), module.eval()(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_single(dtype):
    module = Everything().to(dtype)
    network = lift(module, [(1, 3, 8, 8)])
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}
    assert module.conv.weight.dtype == dtype
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(network.module(x), module.eval().float()(x)) < 1e-6


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, a, b):
            return {"sum": self.conv(a) + b, "rest": [a.mean((2, 3))]}

    network = lift(Two(), [(1, 3, 8, 8), (1, 4, 8, 8)])
    outputs = network.module(*network.random_inputs(2))
    assert [tuple(o.shape) for o in outputs] == [(2, 4, 8, 8), (2, 3)]


def test_a_network_is_lifted_once_only():
    network = lift(Everything(), [(1, 3, 8, 8)])
    assert lift(network.module, [(1, 3, 8, 8)]).module is network.module


def test_what_cannot_be_traced_is_an_error_of_one_line():
    class Asking(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else x.numpy()

    with pytest.raises(UnsupportedModelError, match="torch.export cannot trace it at input 1x3x8x8") as error:
        lift(Asking(), [(1, 3, 8, 8)])
    assert "\n" not in str(error.value)


def test_shapes_of_the_lifted_network_follow_the_batch():
    network = lift(Everything(), [(1, 3, 8, 8)])
    found = shapes(network, batch=5)
    assert found["conv2d"] == (5, 8, 4, 4)
    assert found["output"] == (5, 4)


def test_in_place_dropouts_become_modules():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.2, inplace=True)).eval()
    network = lift(module, [(1, 3, 8, 8)])
    kinds = [type(network.module.get_submodule(path)) for path in network.modules_called()]
    assert kinds == [nn.Conv2d, nn.Dropout, nn.Dropout2d]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network.module(x), module(x), rtol=0, atol=0)
