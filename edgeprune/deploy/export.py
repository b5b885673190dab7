"""A network becomes an ONNX file: folded, dense, static batch 1, weights inside, one table of operators.

    to_onnx(network)   -> onnx.ModelProto

Names
    tensor        the fx name of the node that computes it, so that a tool can map it back; helpers are name.op
    node          the path of the module it came from ("layer1.0.conv1"), or the fx name
    initializer   the path of the parameter ("layer1.0.conv1.weight")
Every size is evaluated at batch 1 and the network's input shapes; what depends on weights and sizes alone becomes a
constant. Opset 17, IR version 8: the oldest that hold LayerNormalization and HardSwish, which older devices load too.
The bytes are the same for the same network.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import fx, nn

from edgeprune.deploy.assemble import assemble, name_ends
from edgeprune.deploy.emit import Arguments, Call, Edge, Emitter
from edgeprune.deploy.onnx_ops import TABLE
from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.fold import fold
from edgeprune.graph.network import CONV_TRANSPOSES, CONVS, Network

aten = torch.ops.aten

_CONV_CALLS = (aten.conv1d, aten.conv2d, aten.conv3d)
_TRANSPOSE_CALLS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def to_onnx(
    network: Network,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Export the network. Names default to those of the graph's nodes; metadata keys get the prefix ``edgeprune.``.

    Raises UnsupportedModelError naming operator and node if one has no row in the table, UsageError on a wrong number
    of names.
    """
    folded = fold(network)
    folded.module.cpu()
    with torch.no_grad():
        writer = _Writer(folded)
        outputs = writer.written()
    model = assemble(writer.emitter, writer.inputs, outputs, metadata or {})
    name_ends(model, input_names, output_names)
    return model


@dataclass(slots=True)
class _Sliced:
    """A chain of slices that is not written yet: one Slice node does for all of it. ``ranges``: the positions taken,
    by dimension."""

    base: Edge
    ranges: dict[int, range]
    call: Call
    edge: Edge | None = None

    def written(self) -> Edge:
        if self.edge is None:
            ranges = {d: r for d, r in self.ranges.items() if r != range(self.base.shape[d])}
            if not ranges:
                self.edge = self.base
                return self.edge
            ends = [(r.start, r.stop if len(r) else r.start, d, r.step) for d, r in sorted(ranges.items())]
            columns = zip(("starts", "ends", "axes", "steps"), zip(*ends, strict=True), strict=True)
            constants = [self.call.constant(list(column), name) for name, column in columns]
            if all(r.step == 1 for r in ranges.values()):
                constants.pop()
            self.edge = self.call.out("Slice", self.base, *constants)
        return self.edge


class _Writer:
    """Walks the graph once. A node's value is an Edge, a constant (tensor, number, list), or a tuple of these."""

    def __init__(self, network: Network):
        self.network = network
        self.module = network.module
        self.emitter = Emitter(network.origin, [n.name for n in network.module.graph.nodes])
        self.values: dict[fx.Node, Any] = {}
        self.inputs: list[Edge] = []
        weights = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        self.dtype = next(weights, torch.float32)  # inputs have the precision of the weights

    def written(self) -> list[Edge]:
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                shape = self.network.input_shapes[len(self.inputs)]
                edge = Edge(node.name, torch.empty(1, *shape[1:], dtype=self.dtype, device="meta"))
                self.inputs.append(edge)
                self.emitter.edges[edge.name] = edge
                self.values[node] = edge
            elif node.op == "get_attr":
                tensor = operator.attrgetter(str(node.target))(self.module)
                self.emitter.names[id(tensor)] = str(node.target)
                self.values[node] = tensor
            elif node.op == "output":
                return self._outputs(node)
            else:
                self.values[node] = self._value(node)
        raise AssertionError("a graph ends with its output")

    def _outputs(self, node: fx.Node) -> list[Edge]:
        """Inputs, constants and repeated tensors are no outputs of a node, so they get one."""
        results: list[Edge] = []
        arguments = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
        for i, argument in enumerate(arguments):
            value = self._written(self.values[argument]) if isinstance(argument, fx.Node) else argument
            if not isinstance(value, Edge) or value in self.inputs or value in results:
                meta = value.meta if isinstance(value, Edge) else torch.as_tensor(value).to("meta")
                name = self.emitter.fresh(f"output_{i}")
                value = Call(self.emitter, name, name, meta).out("Identity", value)
            results.append(value)
        return results

    def _value(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            leaf = self.module.get_submodule(str(node.target))
            target, args = self._as_call(str(node.target), leaf, node.args[0])
            kwargs: dict[str, Any] = {}
            label = str(node.target)
        else:
            target, args, kwargs, label = node.target, node.args, dict(node.kwargs), node.name
        if target is aten.slice.Tensor:
            return self._slice(node, _bound(target, args, kwargs))
        args = fx.node.map_arg(args, lambda n: self._written(self.values[n]))
        kwargs = fx.node.map_arg(kwargs, lambda n: self._written(self.values[n]))
        if target is operator.getitem:
            return args[0][args[1]]
        if not _any_edge((args, kwargs)):
            return self._computed(node, target, args, kwargs)
        meta = self._on_meta(node, target, args, kwargs)
        if not _any_tensor(meta):
            return meta  # a size
        row = TABLE.get(target)
        if row is None:
            raise self._unknown(node)
        call = Call(self.emitter, node.name, label, meta, _part_names(node))
        return row(call, Arguments(**_bound(target, args, kwargs)))

    def _as_call(self, path: str, leaf: nn.Module, source: Any) -> tuple[Any, tuple[Any, ...]]:
        """The operator and arguments of a module; folding left only convolutions and linears."""
        for name, parameter in leaf.named_parameters():
            self.emitter.names.setdefault(id(parameter), f"{path}.{name}")
        if isinstance(leaf, nn.Linear):
            return aten.linear.default, (source, leaf.weight, leaf.bias)
        if isinstance(leaf, CONV_TRANSPOSES):
            target = _TRANSPOSE_CALLS[leaf.weight.dim() - 3]
            geometry = leaf.stride, leaf.padding, leaf.output_padding, leaf.groups, leaf.dilation
            return target, (source, leaf.weight, leaf.bias, *geometry)
        if isinstance(leaf, CONVS) and leaf.padding_mode == "zeros":
            packet = _CONV_CALLS[leaf.weight.dim() - 3]
            target = packet.padding if isinstance(leaf.padding, str) else packet.default
            return target, (source, leaf.weight, leaf.bias, leaf.stride, leaf.padding, leaf.dilation, leaf.groups)
        raise UnsupportedModelError(f"{self.network.origin}: module {path} ({leaf}) cannot be exported to ONNX")

    def _slice(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        values = {k: self.values[v] if isinstance(v, fx.Node) else v for k, v in bound.items()}
        source, dim, step = values["self"], values["dim"], values["step"]
        if isinstance(source, torch.Tensor):
            return aten.slice.Tensor(source, dim, values["start"], values["end"], step)
        base, ranges = (source.base, source.ranges) if isinstance(source, _Sliced) else (source, {})
        dim %= base.rank
        taken = ranges.get(dim, range(base.shape[dim]))[values["start"] : values["end"] : step]
        ranges = {**ranges, dim: taken}
        shape = [len(ranges[d]) if d in ranges else size for d, size in enumerate(base.shape)]
        meta = torch.empty(shape, dtype=base.dtype, device="meta")
        return _Sliced(base, ranges, Call(self.emitter, node.name, node.name, meta))

    def _written(self, value: Any) -> Any:
        return value.written() if isinstance(value, _Sliced) else value

    def _computed(self, node: fx.Node, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What depends on no input is computed now."""
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise UnsupportedModelError(f"{self.network.origin}: node {node.name} ({target}) draws random numbers")
        args, kwargs = _mapped((args, kwargs), lambda v: torch.device("cpu") if isinstance(v, torch.device) else v)
        result = target(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.emitter.names.setdefault(id(result), node.name)
        return result

    def _on_meta(self, node: fx.Node, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Shape and dtype of a call. Where the meta device cannot say (a mask among the constants), zeros can: every
        operator in the table has a shape that does not depend on what is computed."""

        def meta(value: Any) -> Any:
            if isinstance(value, Edge):
                return value.meta
            if isinstance(value, torch.device):
                return torch.device("meta")
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        def zeros(value: Any) -> Any:
            if isinstance(value, Edge):
                return torch.zeros(value.shape, dtype=value.dtype)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        for change in (meta, zeros):
            try:
                return target(*_mapped(args, change), **_mapped(kwargs, change))
            except Exception as error:
                if target not in TABLE:
                    raise self._unknown(node) from None
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(f"{self.network.origin}: node {node.name} ({target}) has no static shape: {reason}")

    def _unknown(self, node: fx.Node) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.network.origin}: operator {node.target} (node {node.name}) has no ONNX form here; "
            "rewrite it with other operators, or add a row to edgeprune/deploy/onnx_ops.py"
        )


def _bound(target: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operator's schema, defaults filled in."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return dict(kwargs)
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update({a.name: v for a, v in zip(schema.arguments, args, strict=False)})
    bound.update(kwargs)
    return bound


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    return change(value)


def _any_edge(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_any_edge(v) for v in value)
    if isinstance(value, dict):
        return any(_any_edge(v) for v in value.values())
    return isinstance(value, Edge)


def _any_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_any_tensor, value)))


def _part_names(node: fx.Node) -> list[str]:
    """For a node that returns several tensors: the names of the getitem nodes that take them."""
    names: dict[int, str] = {}
    for user in node.users:
        if user.target is operator.getitem and isinstance(user.args[1], int):
            names.setdefault(user.args[1], user.name)
    return [names.get(i, "") for i in range(max(names, default=-1) + 1)]
