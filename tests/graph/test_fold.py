import operator

import pytest
import torch
from folding import assert_folds, calls, kinds, network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from edgeprune.graph.fold import denormals, fold
from edgeprune.graph.network import Network


@st.composite
def _convolutions(draw):
    rank, transposed = draw(st.sampled_from([1, 2, 2, 2, 3])), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c_in, c_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    if draw(st.booleans()):
        c_in = c_out = groups = draw(st.integers(2, 5))  # depthwise
    stride = draw(st.integers(1, 3))
    options = {
        "kernel_size": tuple(draw(st.integers(1, 4)) for _ in range(rank)),
        "stride": stride,
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["output_padding"] = draw(st.integers(0, max(stride, options["dilation"]) - 1))
        module = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1](c_in, c_out, **options)
    else:
        module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](c_in, c_out, **options)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](c_out, eps=draw(st.sampled_from([1e-5, 1e-3])))
    affine = draw(st.booleans())
    scale = draw(st.sampled_from([1.0, 1e-12, 1e6]))
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(c_out))
        norm.running_var.copy_(torch.rand(c_out) * scale)
        if affine:
            norm.weight.copy_(torch.randn(c_out))  # negative ones too
            norm.bias.copy_(torch.randn(c_out))
    return nn.Sequential(module, norm), (c_in, *[9] * rank)


@settings(max_examples=60, deadline=None)
@given(_convolutions(), st.integers(0, 10**6))
def test_batch_norm_goes_into_any_convolution(case, seed):
    module, shape = case
    torch.manual_seed(seed)
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("0", (x,))
    graph.output(graph.call_module("1", (y,)))
    folded = assert_folds(Network(fx.GraphModule(module, graph).eval(), ((1, *shape),), "test"))
    assert len(calls(folded)) == 1


def test_batch_norm_after_linear():
    folded = assert_folds(network(nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)), 6))
    assert kinds(folded) == ["Linear"]


def test_the_convolution_takes_the_name_of_the_norm():
    net = network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 3, 8, 8)
    norm = next(n.name for n in net.module.graph.nodes if n.target == "1")
    node = next(n for n in fold(net).module.graph.nodes if n.op == "call_module")
    assert (node.name, node.target) == (norm, "0")


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.norm(x)))


def test_a_norm_with_nothing_before_it_becomes_mul_and_add():
    folded = assert_folds(network(PreActivation(), 3, 8, 8))
    assert kinds(folded) == ["mul.Tensor", "add.Tensor", "relu.default", "Conv2d"]
    assert folded.module.get_buffer("norm_scale").shape == (3, 1, 1)


def test_a_norm_goes_forward_into_unpadded_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.a, self.b = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, bias=False)

        def forward(self, x):
            x = self.norm(x)
            return self.a(x) + self.b(x)

    folded = assert_folds(network(Net(), 4, 8, 8))
    assert kinds(folded) == ["Conv2d", "Conv2d", "add.Tensor"]


def test_a_norm_does_not_go_forward_into_padding():
    folded = assert_folds(network(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), 3, 8, 8))
    assert kinds(folded) == ["mul.Tensor", "add.Tensor", "Conv2d"]


def test_a_norm_goes_forward_into_linear_through_dropout():
    folded = assert_folds(network(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)), 6))
    assert kinds(folded) == ["Linear"]


def test_an_output_that_others_read_stays_unfolded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return x + F.relu(self.norm(x))

    folded = assert_folds(network(Net(), 3, 8, 8))
    assert kinds(folded) == ["Conv2d", "mul.Tensor", "add.Tensor", "relu.default", "add.Tensor"]


class Shared(nn.Module):
    """One convolution, called three times: with norm a, norm a and norm b (or none)."""

    def __init__(self, bare: bool):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bare = bare

    def forward(self, x):
        x = F.relu(self.a(self.conv(x)))
        x = F.relu(self.a(self.conv(x)))
        x = self.conv(x)
        return x if self.bare else self.b(x)


@pytest.mark.parametrize("bare", [False, True])
def test_a_shared_convolution_is_cloned_for_different_norms_only(bare):
    folded = assert_folds(network(Shared(bare), 4, 8, 8))
    targets = [t for t in calls(folded) if isinstance(t, str)]
    assert targets == ["conv", "conv", "conv_2"]


def test_a_shared_convolution_behind_a_norm_is_cloned():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(self.norm(x))))

    folded = assert_folds(network(Net(), 4, 8, 8))
    assert [t for t in calls(folded) if isinstance(t, str)] == ["conv_2", "conv"]


class Arithmetic(nn.Module):
    """Per-channel arithmetic of every kind behind a convolution, which takes it all."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))
        self.beta = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x):
        x = self.norm(self.conv(x) * 0.5) * self.gamma + self.beta
        return (2 - x) / 3 - self.beta + torch.add(self.gamma, x, alpha=0.3)


def test_channelwise_arithmetic_is_taken_in():
    folded = assert_folds(network(Arithmetic(), 3, 8, 8))
    assert kinds(folded)[0] == "Conv2d"
    assert len(calls(folded)) < 8


def test_a_chain_of_arithmetic_leaves_one_convolution():
    class Net(Arithmetic):
        def forward(self, x):
            x = self.norm(self.conv(x) * 0.5) * self.gamma + self.beta
            return (torch.add(self.gamma, (2 - x) / 3 - self.beta, alpha=0.3) - self.gamma).relu()

    folded = assert_folds(network(Net(), 3, 8, 8))
    assert kinds(folded) == ["Conv2d", "relu.default"]


def test_arithmetic_across_other_dimensions_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.row = nn.Parameter(torch.randn(4))  # the width is 4 too

        def forward(self, x):
            return self.conv(x) * self.row

    assert kinds(assert_folds(network(Net(), 3, 4, 4))) == ["Conv2d", "mul.Tensor"]


def test_linear_scale_on_tokens():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.gamma = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.linear(x) * self.gamma

    assert kinds(assert_folds(network(Net(), 5, 6))) == ["Linear"]


def test_a_norm_over_tokens_is_not_the_linears():
    """BatchNorm1d on (N, C, L) has its channels at dimension 1, the linear at the last."""
    folded = assert_folds(network(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), 5, 6))
    assert kinds(folded) == ["Linear", "mul.Tensor", "add.Tensor"]


def test_idle_nodes_go():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dropout = nn.Conv2d(3, 4, 1), nn.Dropout2d(0.3)
            self.unused = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = F.relu(F.relu(self.dropout(self.conv(x))))
            y = F.hardtanh(F.hardtanh(y, -2, 2), -1, 1)
            return y.permute(0, 2, 3, 1).contiguous().flatten(1).clone()

    folded = assert_folds(network(Net(), 3, 8, 8))
    found = kinds(folded)
    assert found.count("relu.default") == 1
    assert found.count("hardtanh.default") == 2  # different bounds
    assert not {"contiguous.default", "clone.default"} & set(found)
    assert "unused" not in dict(folded.module.named_modules())


def test_folding_twice_changes_nothing():
    once = fold(network(PreActivation(), 3, 8, 8))
    twice = fold(once)
    assert str(once.module.graph) == str(twice.module.graph)
    for name, value in once.module.state_dict().items():
        assert torch.equal(value, twice.module.state_dict()[name])


def test_denormal_weights_are_counted_and_flushed():
    net = network(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()), 2, 4, 4)
    weight = net.module.get_parameter("0.weight")
    with torch.no_grad():
        weight.copy_(torch.tensor([1e-40, -1e-39, 2e-38, 0.0]).reshape(2, 2, 1, 1))
    assert denormals(net) == 2
    folded = fold(net)
    assert denormals(folded) == 0
    assert folded.module.get_parameter("0.weight").flatten().tolist() == [0.0, 0.0, float(torch.tensor(2e-38)), 0.0]
    assert denormals(net) == 2


def test_a_fold_that_makes_denormals_flushes_them():
    net = network(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), 2, 4, 4)
    with torch.no_grad():
        net.module.get_parameter("1.weight").fill_(1e-39)
        net.module.get_parameter("1.bias").fill_(0.5)
    folded = fold(net)
    assert denormals(folded) == 0
    assert operator.attrgetter("0.bias")(folded.module).tolist() == [0.5, 0.5]
