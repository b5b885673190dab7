"""What holds for every exported file, on small networks made for it."""

import onnx
import pytest
import torch
from exported import X, assert_clean, largest_error, network_of, outputs, run
from onnx import numpy_helper
from support import randomise_norms
from torch import fx, nn
from torch.nn import functional as F

from edgeprune.deploy.export import to_onnx
from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.graph.lift import lift
from edgeprune.graph.network import Network


def network(module: nn.Module, *shapes: tuple[int, ...]) -> Network:
    torch.manual_seed(0)
    for m in module.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    return lift(randomise_norms(module).eval(), [(1, *s) for s in shapes])


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


class Block(nn.Module):
    """A bit of everything: residual, squeeze-excite, parameter-free shortcut, head."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.SiLU(), nn.Conv2d(4, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y = y * self.se(y).sigmoid()
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(y.mean((2, 3)))


@pytest.fixture(scope="module")
def block() -> Network:
    return network(Block(), (3, 12, 10))


@pytest.fixture(scope="module")
def model(block) -> onnx.ModelProto:
    return to_onnx(block)


def test_file_is_clean_and_right(block, model):
    assert_clean(model)
    assert largest_error(block, model) <= 1e-5
    assert (model.ir_version, model.opset_import[0].version, model.producer_name) == (8, 17, "edgeprune")


def test_names_come_from_modules_and_nodes(block, model):
    names = {node.name: node for node in model.graph.node}
    assert {"conv1", "conv2", "se.1", "se.3", "fc"} <= set(names)
    assert {"conv1.weight", "conv1.bias", "fc.weight", "fc.bias"} <= {t.name for t in model.graph.initializer}
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == [block.module.graph.output_node().args[0].name]


def test_tensor_of_a_nodes_name_has_the_nodes_value(block, model):
    class Recorder(fx.Interpreter):
        def run_node(self, n):
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    seen: dict[str, torch.Tensor] = {}
    inputs = block.random_inputs()
    with torch.no_grad():
        Recorder(block.module).run(*inputs)
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    named = [info for info in model.graph.value_info if info.name in seen]
    assert len(named) >= 10
    probe.graph.output.extend(named)
    for info, value in zip(named, run(probe, inputs)[1:], strict=True):
        torch.testing.assert_close(value, seen[info.name], rtol=1e-4, atol=1e-5)


def test_same_network_same_bytes(block, model):
    assert to_onnx(block.copy()).SerializeToString() == model.SerializeToString()
    again = network(Block(), (3, 12, 10))
    assert to_onnx(again).SerializeToString() == model.SerializeToString()


def test_strided_slices_are_one_node_and_padding_is_on_channels(model):
    found = ops(model)
    assert found.count("Slice") == 1
    assert found.count("Pad") == 1
    constants = {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "Slice")
    assert [constants[i] for i in node.input[1:]] == [[0, 0], [12, 10], [2, 3], [2, 2]]
    pad = next(n for n in model.graph.node if n.op_type == "Pad")
    assert constants[pad.input[1]] == [0, 4, 0, 0, 0, 4, 0, 0]


def test_mean_over_the_image_is_a_global_pooling(model):
    assert ops(model)[-3:] == ["GlobalAveragePool", "Reshape", "Gemm"]


def test_names_and_metadata_can_be_given(block):
    model = to_onnx(block, ["image"], ["logits"], {"target": "cpu", "edgeprune.plan": "{}"})
    assert_clean(model)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits"]
    assert {p.key: p.value for p in model.metadata_props} == {"edgeprune.target": "cpu", "edgeprune.plan": "{}"}
    assert largest_error(block, model) <= 1e-5


def test_a_given_name_that_another_tensor_has(block, model):
    taken = model.graph.node[2].output[0]
    renamed = to_onnx(block, [taken], ["x"])
    assert_clean(renamed)
    assert largest_error(block, renamed) <= 1e-5


@pytest.mark.parametrize(("inputs", "results"), [(["a", "b"], None), (None, []), (["a"], ["a"]), (None, ["x"])])
def test_wrong_names_are_refused(block, inputs, results):
    with pytest.raises(UsageError):
        to_onnx(block, inputs, results)


def test_the_network_is_not_changed(block):
    before = {k: v.clone() for k, v in block.module.state_dict().items()}
    code = block.module.code
    to_onnx(block)
    assert block.module.code == code
    assert all(torch.equal(v, before[k]) for k, v in block.module.state_dict().items())


def test_an_operator_without_a_row_is_named_with_its_node():
    broken = network_of("bessel_j0.default" if hasattr(torch.ops.aten, "bessel_j0") else "erfinv.default", [X((1, 3))])
    with pytest.raises(UnsupportedModelError, match=r"operator aten\.\w+\.default \(node result\) has no ONNX form"):
        to_onnx(broken)


def test_random_numbers_are_refused():
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    noise = graph.call_function(torch.ops.aten.randn.default, ([1, 3],))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (x, noise)))
    with pytest.raises(UnsupportedModelError, match=r"node randn.* draws random numbers"):
        to_onnx(Network(fx.GraphModule(root, graph), ((1, 3),), "test"))


def test_batch_statistics_are_refused():
    net = network(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (3, 5, 5))
    with pytest.raises(UnsupportedModelError, match="statistics of the batch"):
        to_onnx(net)


class Sizes(nn.Module):
    """Sizes, factories and computed weights, all of which become constants."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.table = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        n, c, h, w = x.shape
        x = F.conv2d(x, (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / 2)
        x = x.reshape(n, -1, (h - 2) * (w - 2)).transpose(1, 2)
        grid = torch.linspace(0, 1, x.shape[1])[None, :, None] + torch.arange(6) * torch.ones(6)
        x = torch.cat([(x + grid), torch.zeros(n, x.shape[1], 2)], 2)
        token = self.table.expand(n, -1, -1).repeat(1, 1, 2)
        return torch.cat([token, x], 1) * (c / h)


def test_what_depends_on_sizes_and_weights_is_constant():
    net = network(Sizes(), (4, 7, 6))
    model = to_onnx(net)
    assert_clean(model)
    assert ops(model) == ["Conv", "Reshape", "Transpose", "Add", "Concat", "Concat", "Mul"]
    assert largest_error(net, model) <= 1e-5


def test_several_inputs_and_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

        def forward(self, image, vector):
            x = self.a(image)
            y = self.b(vector)
            return x * y[:, :, None, None], y, x.amax((2, 3))

    net = network(Net(), (3, 6, 6), (5,))
    model = to_onnx(net)
    assert_clean(model)
    assert [i.name for i in model.graph.input] == ["image", "vector"]
    assert len(model.graph.output) == 3
    assert largest_error(net, model) <= 1e-5


def test_inputs_constants_and_repeats_as_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("anchors", torch.randn(2, 3))

        def forward(self, x):
            y = self.conv(x)
            return y, x + 0, y.view(y.shape), self.anchors * 2

    net = network(Net(), (3, 6, 6))
    model = to_onnx(net)
    assert_clean(model, identity=True)
    assert len({o.name for o in model.graph.output}) == 4
    assert largest_error(net, model) <= 1e-5


def test_a_shared_convolution_keeps_one_weight_if_it_can():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    model = to_onnx(network(Net(), (4, 6, 6)))
    assert_clean(model)
    assert [n.name for n in model.graph.node if n.op_type == "Conv"] == ["conv", "conv.2"]
    assert sorted(t.name for t in model.graph.initializer) == ["conv.bias", "conv.weight"]


def test_split_outputs_have_the_names_of_their_nodes():
    class Net(nn.Module):
        def forward(self, x):
            a, b, c = x.split([1, 2, 3], 1)
            return torch.cat([c, a.relu(), b], 1)

    net = network(Net(), (6, 4, 4))
    model = to_onnx(net)
    assert_clean(model)
    split = next(n for n in model.graph.node if n.op_type == "Split")
    getitems = [n.name for n in net.module.graph.nodes if n.name.startswith("getitem")]
    assert sorted(split.output) == sorted(getitems)
    assert largest_error(net, model) <= 1e-5


@pytest.mark.parametrize(
    ("slices", "count"),
    [
        (lambda x: x[:, 1:5][:, 1:3, ::2], 1),
        (lambda x: x[:, :, 1:-1, 2:7:3], 1),
        (lambda x: x[:, 2:][:, 1:][:, ::2], 1),
        (lambda x: torch.cat([x[:, :4], x[:, 4:, :]], 1), 2),
        (lambda x: x[:, :, 1:][:, :, :3] + x[:, :, 1:][:, :, 1:4], 2),
    ],
)
def test_slices_merge(slices, count):
    class Net(nn.Module):
        def forward(self, x):
            return slices(x.relu())

    net = network(Net(), (6, 8, 8))
    model = to_onnx(net)
    assert_clean(model)
    assert ops(model).count("Slice") == count
    assert largest_error(net, model) <= 1e-6


@pytest.mark.parametrize("value", [0.0, -float("inf"), 1.5])
@pytest.mark.parametrize("pool", ["max", "conv", "avg"])
def test_a_border_before_a_window_is_never_changed(pool, value):
    """onnxruntime fuses a border of zeros into a max pooling, where it counts as minus infinity."""
    if pool != "max" and value == -float("inf"):
        pytest.skip("gives infinities")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=(0, 1))

        def forward(self, x):
            x = F.pad(x - 5, (1, 0, 1, 1), value=value)  # all but the border is negative
            if pool == "conv":
                return self.conv(x)
            return F.max_pool2d(x, 3, 2, 1) if pool == "max" else F.avg_pool2d(x, 3, 2, 1)

    net = network(Net(), (3, 8, 8))
    model = to_onnx(net)
    assert_clean(model)
    assert largest_error(net, model) <= 1e-6
    folded = (pool == "conv" and value == 0) or (pool == "max" and value == -float("inf"))
    assert ("Pad" in ops(model)) != folded


def test_a_lone_batch_norm_is_one_depthwise_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x):
            y = torch.cat([x, x.relu()], 1)
            return self.conv(F.relu(self.norm(y)))

    net = network(Net(), (3, 8, 8))
    model = to_onnx(net)
    assert_clean(model)
    assert ops(model) == ["Relu", "Concat", "Conv", "Relu", "Conv"]
    assert largest_error(net, model) <= 1e-6


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (6, 1, 8), (8,), (1,)])
def test_other_scales_and_shifts_stay_right(shape):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(6, 1, 1))

        def forward(self, x):
            y = x.tanh() * self.scale
            return (y + self.shift).relu(), y.relu(), y + self.shift * 2

    net = network(Net(), (6, 8, 8))
    assert_clean(to_onnx(net))
    assert largest_error(net) <= 1e-6


def test_attention_block():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x):
            n, t, c = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c)
            return x + F.gelu(self.out(y))

    net = network(Net(), (7, 12))
    model = to_onnx(net)
    assert_clean(model)
    assert largest_error(net, model) <= 1e-5


def test_unet():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8))
            self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.Hardswish())
            self.up = nn.ConvTranspose2d(16, 8, 2, 2)
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Sequential(nn.Conv2d(16, 4, 1), nn.PixelShuffle(2), nn.Softmax(1))

        def forward(self, x):
            a = self.down(x)
            b = F.interpolate(self.norm(self.up(self.deep(a))), size=a.shape[2:], mode="bilinear")
            return self.head(torch.cat([a, b], 1))

    net = network(UNet(), (3, 18, 20))
    model = to_onnx(net)
    assert_clean(model)
    assert largest_error(net, model) <= 1e-5


def test_double_precision_stays():
    net = network(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), (4,))
    net.module.double()
    model = to_onnx(net)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    x = torch.randn(1, 4, dtype=torch.float64)
    torch.testing.assert_close(run(model, [x])[0], outputs(net, [x])[0])
