"""Emitted nodes become a model: what is dead goes, every tensor gets its shape, inputs and outputs their names."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from edgeprune.deploy.emit import DTYPES, IR_VERSION, OPSET, Edge, Emitter
from edgeprune.errors import UnsupportedModelError, UsageError

_KEPT_NUMEL = 64  # constants up to this size stay constants for shape inference


def assemble(
    emitter: Emitter, inputs: Sequence[Edge], outputs: Sequence[Edge], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """The model of what was emitted, without nodes and initializers that no output needs. Metadata keys get the prefix
    ``edgeprune.``. Raises UnsupportedModelError for a tensor without a static shape."""
    nodes = _alive(emitter.nodes, {edge.name for edge in outputs})
    used = {name for node in nodes for name in node.input}
    initializers = [t for name, t in emitter.initializers.items() if name in used]
    ends = [e.name for e in (*inputs, *outputs)]
    graph = helper.make_graph(
        nodes,
        "network",
        [_info(edge) for edge in inputs],
        [_info(edge) for edge in outputs],
        initializers,
    )
    made = {name for node in nodes for name in node.output}
    known = {name: edge for name, edge in emitter.edges.items() if name in made and name not in ends}
    graph.value_info.extend(_info(edge) for edge in known.values())
    graph.value_info.extend(_inferred(graph, made - set(known) - set(ends), emitter.origin))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "edgeprune"
    model.producer_version = importlib.metadata.version("edgeprune")
    model.model_version = 1
    helper.set_model_props(
        model, {k if k.startswith("edgeprune.") else f"edgeprune.{k}": str(metadata[k]) for k in sorted(metadata)}
    )
    return model


def _alive(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    alive = []
    for node in reversed(nodes):
        if any(name in wanted for name in node.output):
            alive.append(node)
            wanted.update(node.input)
    return alive[::-1]


def _info(edge: Edge) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(edge.name, DTYPES[edge.dtype], edge.shape)


def _inferred(graph: onnx.GraphProto, names: set[str], origin: str) -> list[onnx.ValueInfoProto]:
    """Shapes of helper tensors, by ONNX's own inference on the graph without its weights."""
    if not names:
        return []
    bare = onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output)
    bare.value_info.extend(graph.value_info)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _KEPT_NUMEL:
            bare.initializer.append(tensor)
        else:
            bare.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model = helper.make_model(bare, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    result = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.value_info
    infos = [info for info in result if info.name in names]
    for info in infos:
        if any(not d.HasField("dim_value") for d in info.type.tensor_type.shape.dim):
            raise UnsupportedModelError(f"{origin}: tensor {info.name} has no static shape")
    return infos


def name_ends(model: onnx.ModelProto, input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> None:
    """Give inputs and outputs the names wanted (None: those they have); a tensor that has such a name makes way.

    Raises UsageError on a wrong number of names, or a name given twice.
    """
    wanted = _wanted_names(model.graph, input_names, output_names)
    wanted = {old: new for old, new in wanted.items() if old != new}
    if not wanted:
        return
    graph = model.graph
    present = {n for node in graph.node for n in (*node.input, *node.output)} | {i.name for i in graph.input}
    renames = dict(wanted)
    for name in set(wanted.values()) & present - set(wanted):
        number = 2
        while f"{name}.{number}" in present:
            number += 1
        renames[name] = f"{name}.{number}"
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name in renames:
                    names[i] = renames[name]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = renames.get(value.name, value.name)


def _wanted_names(
    graph: onnx.GraphProto, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for what, ends, names in (("input", graph.input, input_names), ("output", graph.output, output_names)):
        names = [end.name for end in ends] if names is None else names
        if len(names) != len(ends):
            raise UsageError(f"{len(names)} {what} names given, the network has {len(ends)} {what}s")
        wanted.update({end.name: name for end, name in zip(ends, names, strict=True)})
    if len(set(wanted.values())) != len(wanted):
        raise UsageError(f"input and output names must differ, got {', '.join(wanted.values())}")
    return wanted
