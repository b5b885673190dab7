"""Helpers of the export tests: a network of one call, running a file, and what every exported file must be."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import fx, nn

from edgeprune.deploy.export import to_onnx
from edgeprune.graph.network import Network

aten = torch.ops.aten


@dataclass(frozen=True)
class X:
    """An activation of this shape: "normal", "positive" (0.1 and up), "bool", or "index" (int64 below ``below``)."""

    shape: tuple[int, ...]
    kind: str = "normal"
    below: int = 0


def overload(name: str) -> Any:
    packet, _, which = name.partition(".")
    return getattr(getattr(aten, packet), which)


def network_of(
    name: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None, first_only: bool = False
) -> Network:
    """The network ``aten.name(*args, **kwargs)``: activations become inputs, tensors buffers; all results come out,
    or only the first of them."""
    root, graph, shapes = nn.Module(), fx.Graph(), []

    def activation(x: X) -> fx.Node:
        node = graph.placeholder(f"x{len(shapes)}")
        shapes.append(x.shape if x.kind != "index" else (*x.shape, x.below))
        return node

    def derived(node: fx.Node, x: X) -> fx.Node:
        if x.kind == "positive":
            return graph.call_function(aten.add.Tensor, (graph.call_function(aten.abs.default, (node,)), 0.1))
        if x.kind == "bool":
            return graph.call_function(aten.gt.Scalar, (node, 0))
        if x.kind == "index":
            return graph.call_function(aten.argmax.default, (node, -1))
        return node

    found: list[X] = []
    fx.node.map_aggregate((tuple(args), kwargs or {}), lambda v: found.append(v) if isinstance(v, X) else v)
    placeholders = [activation(x) for x in found]
    nodes = iter([derived(node, x) for node, x in zip(placeholders, found, strict=True)])

    def value(v: Any) -> Any:
        if isinstance(v, X):
            return next(nodes)
        if isinstance(v, torch.Tensor):
            path = f"constant{len(list(root.buffers()))}"
            root.register_buffer(path, v)
            return graph.get_attr(path)
        return v

    mapped_args, mapped_kwargs = fx.node.map_aggregate((tuple(args), kwargs or {}), value)
    target = overload(name)
    result: Any = graph.create_node("call_function", target, mapped_args, mapped_kwargs, "result")
    returns = target._schema.returns
    count = len(returns)
    if count == 1 and "List" in str(returns[0].type):
        module = fx.GraphModule(root, _closed(graph, result))
        with torch.no_grad():
            parts = module(*(torch.randn(s) for s in shapes))
        graph.erase_node(next(n for n in graph.nodes if n.op == "output"))
        count = len(parts)
        result = tuple(graph.call_function(operator.getitem, (result, i)) for i in range(count))
    elif first_only and count > 1:
        result = graph.call_function(operator.getitem, (result, 0))
    elif count > 1:
        result = tuple(graph.call_function(operator.getitem, (result, i)) for i in range(count))
    module = fx.GraphModule(root, _closed(graph, result))
    return Network(module.eval(), tuple(shapes), "test")


def _closed(graph: fx.Graph, result: Any) -> fx.Graph:
    graph.output(result)
    return graph


def run(model: onnx.ModelProto, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [
        torch.from_numpy(np.asarray(y))
        for y in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    ]


def outputs(network: Network, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        result = network.module(*inputs)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def largest_error(network: Network, model: onnx.ModelProto | None = None, seeds: Sequence[int] = (1, 2)) -> float:
    """Largest error of the exported file against torch, relative to the largest value; integers must be equal."""
    model = to_onnx(network) if model is None else model
    worst = 0.0
    for seed in seeds:
        inputs = network.random_inputs(seed=seed)
        expected, actual = outputs(network, inputs), run(model, inputs)
        assert len(expected) == len(actual)
        for want, have in zip(expected, actual, strict=True):
            assert want.shape == have.shape
            assert want.dtype == have.dtype
            if not want.dtype.is_floating_point:
                assert torch.equal(want, have)
            elif want.numel():
                infinite = torch.isinf(want)
                assert torch.equal(infinite, torch.isinf(have))
                gap = (want - have).masked_fill(infinite, 0).abs().max()
                scale = want.masked_fill(infinite, 0).abs().max().clamp_min(1e-6)
                worst = max(worst, float(gap / scale))
    return worst


def assert_clean(model: onnx.ModelProto, identity: bool = False) -> None:
    """What holds for every file: valid, static shapes everywhere, nothing idle, no name of this machine in it."""
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    graph = model.graph
    ops = {node.op_type for node in graph.node}
    assert "BatchNormalization" not in ops
    assert identity or "Identity" not in ops
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    assert {t.name for t in graph.initializer} <= read
    assert all(any(name in read for name in node.output) for node in graph.node)
    known = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        dims = info.type.tensor_type.shape.dim
        assert all(d.HasField("dim_value") for d in dims), info.name
        known[info.name] = tuple(d.dim_value for d in dims)
    assert all(name in known for node in graph.node for name in node.output)
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    for info in onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True).graph.value_info:
        dims = info.type.tensor_type.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            assert known[info.name] == tuple(d.dim_value for d in dims), info.name
    for text in _strings(model):
        assert "site-packages" not in text, text
        assert "/" not in text, text


def _strings(message: Any) -> list[str]:
    texts: list[str] = []
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.type == field.TYPE_MESSAGE:
            texts.extend(text for v in values for text in _strings(v))
        elif field.type == field.TYPE_STRING:
            texts.extend(values)
    return texts
