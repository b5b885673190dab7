"""TorchScript as data: traced and scripted networks equal their modules, in any batch and size."""

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import nn

from edgeprune.errors import EdgepruneError, UnsupportedModelError
from edgeprune.graph.load import load


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out)) if stride > 1 else None

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(3, 3, 1), Block(3, 8, 2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layer1(x), (1, 1)), 1))


class Mixed(nn.Module):
    """Loops over a module list, sizes, chunks, a channel shuffle, interpolation, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(2)])
        self.norm = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x):
        y = F.hardswish(self.stem(x)) * self.scale
        y = torch.cat([F.interpolate(y, scale_factor=2.0, mode="nearest"), self.up(y)], 1)
        b, c, h, w = y.shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        y, gate = y.chunk(2, 1)
        y = y * torch.sigmoid(gate)
        for block in self.blocks:
            y = self.drop(F.gelu(self.norm(block(y))))
        if self.training:
            y = y + 1
        y = F.interpolate(y, size=[h // 2, w // 2], mode="bilinear", align_corners=False)
        return y, y[:, ::2].mean((2, 3)).view(x.size(0), -1)


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        outputs = {"b": self.b(x)}
        outputs["a"] = self.a(x)
        return outputs


def randomised(module):
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.uniform_(-0.5, 0.5)
            child.running_var.uniform_(0.5, 1.5)
    return module.eval()


def flat(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("how", ["traced", "scripted", "scripted in training mode"])
@pytest.mark.parametrize("kind", [Residual, Mixed])
def test_equal_to_the_module(kind, how, tmp_path):
    module = randomised(kind())
    if how == "traced":
        script = torch.jit.trace(module, torch.randn(2, 3, 16, 16))
    else:
        script = torch.jit.script(module.train() if "training" in how else module)
    torch.jit.save(script, tmp_path / "m.pt")
    network = load(tmp_path / "m.pt", input_shapes=[(1, 3, 16, 16)])
    module.eval()
    for shape in ((1, 3, 16, 16), (3, 3, 16, 16), (2, 3, 24, 32)):
        x = torch.randn(shape)
        with torch.no_grad():
            for actual, expected in zip(flat(network.module(x)), flat(module(x)), strict=True):
                assert relative_error(actual, expected) < 1e-6
    assert {n for n, _ in network.module.named_parameters()} == {n for n, _ in module.named_parameters()}


def test_dicts_and_tied_weights(tmp_path):
    module = Logits().eval()
    torch.jit.save(torch.jit.script(module), tmp_path / "m.pt")
    network = load(tmp_path / "m.pt", input_shapes=[(1, 4)])
    x = torch.randn(3, 4)
    for actual, expected in zip(network.module(x), module(x).values(), strict=True):
        assert relative_error(actual, expected) < 1e-6
    assert network.module.get_submodule("a").weight is network.module.get_submodule("b").weight


def test_the_model_may_refuse_its_input(tmp_path):
    class Strict(nn.Module):
        def forward(self, x):
            if x.size(1) != 3:
                raise ValueError("three channels, please")
            return x

    torch.jit.save(torch.jit.script(Strict()), tmp_path / "m.pt")
    load(tmp_path / "m.pt", input_shapes=[(1, 3, 4, 4)])
    with pytest.raises(UnsupportedModelError, match="three channels, please"):
        load(tmp_path / "m.pt", input_shapes=[(1, 4, 4, 4)])


def test_state_restored_by_code_is_refused(tmp_path):
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.ones(3)

        @torch.jit.export
        def __getstate__(self):
            return self.w, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            self.w = state[0]
            self.training = state[1]

        def forward(self, x):
            return x + self.w

    torch.jit.save(torch.jit.script(Stateful()), tmp_path / "m.pt")
    with pytest.raises(UnsupportedModelError, match="__setstate__"):
        load(tmp_path / "m.pt", input_shapes=[(1, 3)])


def test_control_flow_on_values_is_an_error(tmp_path):
    class Asking(nn.Module):
        def forward(self, x):
            if bool(x.sum() > 0):
                x = x + 1
            return x

    torch.jit.save(torch.jit.script(Asking()), tmp_path / "m.pt")
    with pytest.raises(EdgepruneError, match="depends on values of tensors"):
        load(tmp_path / "m.pt", input_shapes=[(1, 3)])


def test_custom_operators_are_refused_by_name(tmp_path):
    library = torch.library.Library("edgeprune_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")

    class Custom(nn.Module):
        def forward(self, x):
            return torch.ops.edgeprune_test.twice(x)

    torch.jit.save(torch.jit.script(Custom()), tmp_path / "m.pt")
    with pytest.raises(UnsupportedModelError, match="edgeprune_test::twice"):
        load(tmp_path / "m.pt", input_shapes=[(1, 3)])
