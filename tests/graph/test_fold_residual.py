"""A convolution with its own shortcut, folded, against the same network unfolded."""

import itertools

import pytest
import torch
from folding import assert_folds, kinds, network
from support import randomise_norms, relative_error
from torch import fx, nn
from torch.nn import functional as F

from edgeprune.errors import UsageError
from edgeprune.graph.fold import fold
from edgeprune.graph.network import Network, check
from edgeprune.nn import ResConv2d

KINDS = {"full": 1, "grouped": 2, "depthwise": 8}


class Residual(nn.Module):
    """lam * norm(conv(x)) + m * x, with random lam and m, one number or one a channel."""

    def __init__(self, conv, norm=None, per_channel=False):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shape = (conv.in_channels, *[1] * (conv.weight.dim() - 2)) if per_channel else ()
        self.conv, self.norm = conv, norm
        self.lam = nn.Parameter(torch.rand(shape, generator=generator) + 0.3)
        self.m = nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, x):
        y = self.conv(x)
        y = y if self.norm is None else self.norm(y)
        return self.lam * y + self.m * x


def written(module, *shape):
    """The graph of a ``Residual`` by hand, for those that are many: exporting takes its time."""
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    graph = fx.Graph()
    x = graph.placeholder("x")
    kept = graph.call_function(torch.ops.aten.mul.Tensor, (graph.get_attr("m"), x))
    y = graph.call_module("conv", (x,))
    y = y if module.norm is None else graph.call_module("norm", (y,))
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (y, graph.get_attr("lam")))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (scaled, kept)))
    net = Network(fx.GraphModule(randomise_norms(module), graph).eval(), ((1, *shape),), "by hand")
    check(net)
    return net


def error_in_double(net, folded):
    """Of the folded network in single precision, against the unfolded one in double."""
    x = net.random_inputs(2, seed=5)[0]
    with torch.no_grad():
        return relative_error(folded.module(x).double(), net.copy().module.double()(x.double()))


@pytest.mark.parametrize(("k", "dilation", "kind"), list(itertools.product([1, 3, 5], [1, 2, 3], KINDS)))
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_grid(k, dilation, kind, bias, norm):
    conv = nn.Conv2d(8, 8, k, padding=dilation * (k - 1) // 2, dilation=dilation, groups=KINDS[kind], bias=bias)
    torch.manual_seed(k + dilation)
    for per_channel in (False, True):
        net = written(Residual(conv, nn.BatchNorm2d(8) if norm else None, per_channel), 8, 9, 7)
        folded = fold(net)
        assert kinds(folded) == ["Conv2d"]
        assert error_in_double(net, folded) <= 1e-5


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](4, 4, 3, padding=1, groups=2)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](4)
    net = network(Residual(conv, norm), 4, *[6] * rank)
    assert len(kinds(folded := fold(net))) == 1
    assert error_in_double(net, folded) <= 1e-5


class Plain(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x) + 0.5 * x


REFUSED = {  # each broadcasts or happens to keep its shape, so that only the rules keep it from being folded
    "even kernel": (nn.Conv2d(4, 4, 4, padding=3, dilation=2), (4, 8, 8)),
    "kernel even one way": (nn.Conv2d(4, 4, (3, 2), padding=(1, 1), dilation=(1, 2)), (4, 8, 8)),
    "valid padding": (nn.Conv2d(4, 4, 3), (4, 3, 3)),
    "too much padding": (nn.Conv2d(4, 4, 3, padding=2), (4, 1, 1)),
    "stride": (nn.Conv2d(4, 4, 3, stride=2, padding=1), (4, 1, 1)),
    "channels": (nn.Conv2d(1, 4, 3, padding=1), (1, 6, 6)),
    "transposed": (nn.ConvTranspose2d(4, 4, 3, padding=1), (4, 6, 6)),
    "padding that is not zero": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (4, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_identity_stays(name):
    conv, shape = REFUSED[name]
    net = network(Plain(conv), *shape)
    folded = fold(net)
    assert "add.Tensor" in kinds(folded)
    assert error_in_double(net, folded) <= 1e-5


class Around(nn.Module):
    """Variants of what is added to what; each method is one."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.identity = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.after = nn.BatchNorm2d(4)

    def forward(self, x):
        return getattr(self, self.how)(F.relu(x))

    def identity_batch_norm(self, x):
        return self.norm(self.a(x)) + self.identity(x)

    def shortcut_first(self, x):
        return F.relu(x + self.norm(self.a(x)))

    def alpha(self, x):
        return torch.add(self.a(x), x, alpha=0.3)

    def alpha_on_the_convolution(self, x):
        return torch.add(x, self.norm(self.a(x)), alpha=-0.7)

    def difference(self, x):
        return self.a(x) - (2 * x + 1)

    def other_way_round(self, x):
        return torch.sub(x, self.norm(self.a(x)), alpha=2)

    def then_a_norm(self, x):
        return F.relu(self.after(self.a(x) + x) * 3 - 1)

    def two_shortcuts(self, x):
        scaled = 0.5 * x
        return self.a(x) + scaled + scaled + self.identity(x)

    def a_chain(self, x):
        x = self.norm(self.a(x)) + x
        return self.b(x) + x

    def input_of_another(self, x):
        return self.a(self.b(x)) + x

    def read_twice(self, x):
        y = self.a(x)
        return (y + x) * torch.sigmoid(y)

    def twice_itself(self, x):
        y = self.a(x)
        return y + y

    def a_row(self, x):
        return self.a(x) + x * torch.linspace(0, 1, 4)  # the map is four wide: no channel has one factor

    def called_twice(self, x):
        return self.a(self.a(x) + x)


ADDED = {
    "identity_batch_norm": (1, 0), "shortcut_first": (1, 0), "alpha": (1, 0), "alpha_on_the_convolution": (1, 0),
    "difference": (1, 0), "other_way_round": (1, 0), "then_a_norm": (1, 0), "two_shortcuts": (1, 0),
    "a_chain": (2, 0), "input_of_another": (2, 1), "read_twice": (1, 1), "twice_itself": (1, 1), "a_row": (1, 1),
    "called_twice": (2, 0),
}  # fmt: skip


@pytest.mark.parametrize("how", ADDED)
def test_what_is_added_to_what(how):
    net = network(Around(how), 4, 4, 4)
    folded = assert_folds(net)
    found = kinds(folded)
    assert (found.count("Conv2d"), found.count("add.Tensor") + found.count("sub.Tensor")) == ADDED[how]
    assert not [n for n in folded.module.graph.nodes if n.op == "get_attr" and not n.users]
    assert error_in_double(net, folded) <= 1e-5


def test_a_convolution_called_twice_is_cloned_for_its_shortcut():
    folded = assert_folds(network(Around("called_twice"), 4, 4, 4))
    assert len({n.target for n in folded.module.graph.nodes if n.op == "call_module"}) == 2


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.SiLU()])
def test_the_layer_to_train_with_folds(norm, activation):
    layers = [ResConv2d(8, k, dilation=d, groups=g, norm=norm, activation=activation)
              for k, d, g in ((1, 1, 1), (3, 2, 4), (5, 1, 8))]  # fmt: skip
    net = network(nn.Sequential(*layers), 8, 9, 9)
    with torch.no_grad():
        for name, parameter in net.module.named_parameters():
            if name.endswith((".lam", ".m")):
                parameter.copy_(torch.randn(()))
    found = kinds(fold(net))
    assert found.count("Conv2d") == 3
    assert len(found) == (3 if activation is None else 6)
    assert error_in_double(net, fold(net)) <= 1e-5


@pytest.mark.parametrize("options", [{"kernel_size": 2}, {"kernel_size": 4, "dilation": 2}, {"groups": 3}])
def test_the_layer_refuses_what_cannot_fold(options):
    with pytest.raises(UsageError, match="expected"):
        ResConv2d(8, **options)
