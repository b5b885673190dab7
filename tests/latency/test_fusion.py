"""The list of kernels against the graph onnxruntime really runs."""

import dataclasses

import numpy as np
import onnx
import onnx_nets as nets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.device.target import Fusion
from edgeprune.errors import UnsupportedModelError
from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import Kernel

NETWORKS = {
    "basic": nets.resnet(),
    "basic, padding shortcut": nets.resnet(shortcut="padding"),
    "basic, 24": nets.resnet(24),
    "basic, 24 padded": nets.resnet(24, "padding"),
    "basic, odd": nets.resnet(22),
    "basic, odd inside": nets.resnet(32, inner=17),
    "basic, narrow inside": nets.resnet(32, inner=8),
    "bottleneck": nets.bottleneck(),
    "bottleneck, 12": nets.bottleneck(12),
    "inverted": nets.inverted_residual(),
    "inverted, 16": nets.inverted_residual(16),
    "inverted, 7": nets.inverted_residual(7),
    "squeeze-excite": nets.squeeze_excite(),
    "squeeze-excite, 40": nets.squeeze_excite(40, "HardSigmoid"),
    "dense": nets.dense(),
    "dense, 24": nets.dense(24, 12),
}


@nets.needs_blocks
@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_those_of_the_runtime(name, tmp_path):
    nets.compare(NETWORKS[name], tmp_path)


@nets.needs_blocks
@settings(max_examples=15, deadline=None)
@given(c=st.integers(3, 40), inner=st.integers(3, 40), padding=st.booleans())
def test_kernels_at_any_width(c, inner, padding, tmp_path_factory):
    model = nets.resnet(c, "padding" if padding else "projection", inner, size=8)
    nets.compare(model, tmp_path_factory.mktemp("optimised"))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("block", [0, 8, 16])
def test_every_node_is_covered_once(name, block):
    model = NETWORKS[name]
    found = sites(model, dataclasses.replace(Fusion(), block=block))
    covered = [node for site in found for node in site.nodes]
    assert sorted(covered) == sorted(node.name for node in model.graph.node)
    for site in found:
        assert site.name == site.nodes[0]
        assert len(site.inputs) == len(site.kernel.inputs)
        assert Kernel.from_key(site.kernel.key()) == site.kernel


def test_no_layout_letters_without_a_blocked_layout():
    found = sites(NETWORKS["basic, padding shortcut"], dataclasses.replace(Fusion(), block=0))
    assert all(site.kernel.attr("io") == "" for site in found)
    assert ("Add", "Relu") in {site.kernel.tail for site in found}


def test_depthwise_keys_do_not_depend_on_the_width():
    attrs = [
        {s.kernel.attrs for s in sites(nets.inverted_residual(c)) if s.kernel.attr("group") == "dw"} for c in (16, 24)
    ]
    assert attrs[0] == attrs[1]
    assert len(attrs[0]) == 1


def test_twins_are_one_kernel():
    b = nets.Builder()
    x = b.relu(b.conv("x", 3, 32))
    first = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    again = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    model = b.model(b.pooled(b.op("Add", b.conv(first, 32, 32), b.conv(again, 32, 32)), 32))
    found = [site for site in sites(model) if site.kernel.op == "MaxPool"]
    assert len(found) == 1
    assert len(found[0].nodes) == 2


def test_shapes_are_demanded():
    b = nets.Builder()
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, "h", "w"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"], name="r")]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], b.constants)
    with pytest.raises(UnsupportedModelError, match="static shape"):
        sites(onnx.helper.make_model(graph))


def test_constant_subgraphs_cost_nothing():
    b = nets.Builder()
    doubled = b.op("Mul", b.weight(8, 3, 3, 3), b.constant(np.float32(2)))
    y = b.op("Relu", b.op("Add", "x", b.constant(np.float32(1))))
    model = b.model(y)
    assert doubled not in {site.output for site in sites(model)}
