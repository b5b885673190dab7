"""Kernels rebuilt alone give the nodes, shapes and reorders they had in their network, in the real runtime."""

import dataclasses

import numpy as np
import onnx
import onnx_nets as nets
import pytest
from tables import FINGERPRINT, conv

from edgeprune.device.connect import connect
from edgeprune.device.target import Protocol, Target
from edgeprune.errors import TableError
from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.measure import REFERENCE, measure_batch, measure_memory, measure_overhead
from edgeprune.latency.micro import build, weight_bytes
from edgeprune.latency.signature import RESHAPES

QUICK = Target("cpu", protocol=Protocol(warmup_ms=1, kernel_ms=2, evict_mb=1))


def everything() -> onnx.ModelProto:
    """A network of the operators that the hand-built ones lack."""
    b = nets.Builder()
    x = b.relu(b.conv("x", 3, 16))
    ints = lambda *v: b.constant(np.array(v, np.int64))  # noqa: E731
    x = b.op("Slice", x, ints(0), ints(99), ints(3), ints(2))
    x = b.op("Pad", x, ints(0, 0, 0, 1, 0, 0, 0, 1), mode="reflect")
    x = b.op("Transpose", x, perm=[0, 2, 3, 1])
    x = b.op("LayerNormalization", x, b.weight(16), b.weight(16), axis=-1)
    x = b.op("Add", b.op("MatMul", x, b.weight(16, 24)), b.weight(24))
    erf = b.op("Erf", b.op("Div", x, b.constant(np.float32(2**0.5))))
    x = b.op("Mul", b.op("Mul", x, b.op("Add", erf, b.constant(np.float32(1)))), b.constant(np.float32(0.5)))
    x = b.op("Transpose", x, perm=[0, 3, 1, 2])
    x = b.op("Gather", x, ints(*range(0, 24, 2)), axis=1)
    x = b.op("Reshape", x, ints(1, 2, 6, 16, 10))
    x = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3, 4]), ints(1, 12, 16, 10))
    x = b.op("ConvTranspose", x, b.weight(12, 8, 2, 2), b.weight(8), kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("DepthToSpace", b.conv(x, 8, 16), blocksize=2)
    mean = b.op("ReduceMean", x, axes=[2, 3], keepdims=1)
    x = b.op("Sub", x, b.op("Expand", mean, ints(1, 4, 1, 40)))
    x = b.op("Softmax", b.op("Max", x, b.op("Sqrt", b.op("Abs", x))), axis=1)
    x = b.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=1)
    x = b.op("BatchNormalization", x, *(b.weight(4) for _ in range(3)), b.constant(np.ones(4, np.float32)))
    x = b.op("Tile", b.op("GlobalMaxPool", x), ints(1, 1, 2, 2))
    x = b.op("MatMul", b.op("Flatten", x), b.weight(16, 8))
    return b.model(b.op("HardSwish", b.op("Add", x, b.weight(8))))


NETWORKS = {
    "padding": nets.resnet(shortcut="padding"),
    "bottleneck": nets.bottleneck(12),
    "inverted": nets.inverted_residual(),
    "squeeze-excite": nets.squeeze_excite(40),
    "dense": nets.dense(),
    "everything": everything(),
}


@pytest.fixture(scope="module")
def device():
    with connect(QUICK) as opened:
        yield opened


@pytest.mark.parametrize("name", NETWORKS)
def test_rebuilt_kernels_have_their_shapes(name):
    kernels = list(dict.fromkeys(site.kernel for site in sites(NETWORKS[name])))
    micro = build(kernels)
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(micro.model), strict_mode=True, data_prop=True)
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*model.graph.value_info, *model.graph.output)
    }
    for index, kernel in enumerate(kernels):
        nodes = [node for node in model.graph.node if node.name.startswith(f"k{index}_")]
        assert shapes[nodes[-1].output[0]] == kernel.output or shapes[nodes[0].output[0]] == kernel.output
        assert {kernel.op} <= {node.op_type for node in nodes} | set(RESHAPES)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kernel_is_measured(name, device):
    kernels = list(dict.fromkeys(site.kernel for site in sites(NETWORKS[name])))
    rows = measure_batch(device, kernels)
    assert [row.key for row in rows] == [kernel.key() for kernel in kernels]
    for kernel, row in zip(kernels, rows, strict=True):
        assert not row.error
        assert row.hot_ref_ms > 0
        assert row.n > 0
        assert (row.hot_ms > 0 and row.nodes > 0) or kernel.op == "Reshape"


@nets.needs_blocks
@pytest.mark.parametrize("name", ["padding", "inverted", "squeeze-excite", "dense"])
def test_a_kernel_is_charged_its_reorders(name, device):
    kernels = list(dict.fromkeys(site.kernel for site in sites(NETWORKS[name])))
    for kernel, row in zip(kernels, measure_batch(device, kernels), strict=True):
        letters, _, out = kernel.attr("io", "b" * len(kernel.inputs) + ">b").partition(">")
        plain = out == "p"
        direct = kernel.op == "Conv" and kernel.inputs[0][1] < 16 and kernel.attr("group") == "1"
        reorders = sum(
            (letter == "b") == (plain or (direct and position == 0)) for position, letter in enumerate(letters)
        )
        own = 2 if kernel.op == "HardSwish" else 1
        if kernel.op == "Reshape":
            continue
        assert row.nodes == own + reorders, kernel.key()


def test_large_constants_are_left_to_the_device():
    kernel = conv(256, 256)
    micro = build([kernel])
    assert len(micro.model) < 10_000
    assert weight_bytes(kernel) == 256 * 256 * 9 * 4
    assert micro.weight_bytes >= weight_bytes(kernel)


@pytest.mark.parametrize(
    "kernel",
    [
        conv(64, 64).with_attrs(group="3"),
        conv(64, 64).with_attrs(io="bbb>b"),
        dataclasses.replace(conv(64, 64), op="NoSuchOperator"),
        Kernel("Cast", (("to", "x"),), ((1, 4),), (1, 4)),
        Kernel("Split", (), ((1, 4),), (1, 4)),
    ],
)
def test_what_cannot_be_rebuilt_is_named(kernel):
    with pytest.raises(TableError) as error:
        build([REFERENCE, kernel])
    assert kernel.key() in str(error.value)


def test_costs_around_the_kernels_are_measured(device):
    overhead = measure_overhead(device)
    assert 0 <= overhead.hot_ms < 1
    assert overhead.ref_ms > 0
    rows = measure_memory(device)
    assert len({row.key for row in rows}) == len(rows)
    assert all(row.raw_ms > 0 and row.ref_ms > 0 for row in rows)
    assert device.fingerprint != FINGERPRINT
