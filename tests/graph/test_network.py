"""The canonical form: what check() refuses, and shapes without values."""

import pytest
import torch
from torch import fx, nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.lift import lift
from edgeprune.graph.network import Network, check, shapes


def made(root, build, inputs=1):
    graph = fx.Graph()
    build(graph)
    return Network(fx.GraphModule(root, graph), ((1, 3, 8, 8),) * inputs, "test")


def test_check_refuses_methods_foreign_modules_and_in_place_calls():
    root = nn.Module()
    root.act = nn.ReLU()

    def method(graph):
        graph.output(graph.call_method("relu", (graph.placeholder("x"),)))

    def module(graph):
        graph.output(graph.call_module("act", (graph.placeholder("x"),)))

    def in_place(graph):
        graph.output(graph.call_function(torch.ops.aten.relu_.default, (graph.placeholder("x"),)))

    for build, says in ((method, "method call"), (module, "ReLU"), (in_place, "in-place")):
        with pytest.raises(UnsupportedModelError, match=says):
            check(made(root, build))


def test_check_counts_inputs():
    network = made(nn.Module(), lambda graph: graph.output(graph.placeholder("x")), inputs=2)
    with pytest.raises(UnsupportedModelError, match="1 inputs in the graph, 2 input shapes"):
        check(network)


def test_shapes_allocate_nothing():
    """A factory call of four terabytes has a shape like any other."""

    def build(graph):
        x = graph.placeholder("x")
        zeros = graph.create_node("call_function", torch.ops.aten.zeros.default, ([1 << 40],), name="zeros")
        graph.call_function(torch.ops.aten.full.default, ([4], 1.0), {"device": torch.device("cpu")})
        graph.output((x, zeros))

    found = shapes(made(nn.Module(), build), batch=2)
    assert found["x"] == (2, 3, 8, 8)
    assert found["zeros"] == (1 << 40,)


def test_shapes_leave_the_network_alone():
    network = lift(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), [(1, 3, 8, 8)])
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    assert shapes(network, batch=7)["output"] == (7, 4, 6, 6)
    for name, value in network.module.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


def test_a_copy_shares_nothing():
    network = lift(nn.Conv2d(3, 4, 3), [(1, 3, 8, 8)])
    other = network.copy()
    with torch.no_grad():
        for p in other.module.parameters():
            p.zero_()
    assert all(bool(p.abs().sum() > 0) for p in network.module.parameters())


def test_random_inputs_are_the_same_for_the_same_seed():
    network = lift(nn.Conv2d(3, 4, 3), [(1, 3, 8, 8)])
    (a,), (b,), (c,) = network.random_inputs(2, 1), network.random_inputs(2, 1), network.random_inputs(2, 2)
    assert a.shape == (2, 3, 8, 8)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
