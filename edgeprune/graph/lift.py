"""A torch module or an exported program becomes a Network: exported weights are lifted back into modules.

``torch.export`` gives a flat graph of ATen calls on weight attributes. Convolutions, linears, batch norms and dropouts
become modules again, so that they can be cut, trained and folded; every other call stays as it is. Weights that are
computed in the forward (weight standardisation, parametrisations) are no attribute: such a call stays functional.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from edgeprune.errors import EdgepruneError, UnsupportedModelError
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, Network, check

aten = torch.ops.aten

_CONV_OPS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_CONV_PADDING_OPS = {aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}
_TRANSPOSE_OPS = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
_DROPOUT_OPS = {
    aten.dropout.default: nn.Dropout,
    aten.dropout_.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.feature_dropout_.default: nn.Dropout2d,
}
_NO_OPS = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default}


def lift(
    module: nn.Module, input_shapes: Sequence[Sequence[int]], origin: str = "model", strict: bool = True
) -> Network:
    """Bring an ``nn.Module`` to the canonical form.

    input_shapes: one shape per input, batch in front (any value), e.g. [(1, 3, 224, 224)].
    strict: whether a module that cannot be traced as it runs may be analysed as byte code (slower, sees branches)
    Raises UnsupportedModelError when ``torch.export`` cannot trace the module at these shapes.
    """
    shapes = tuple((1, *(int(d) for d in shape[1:])) for shape in input_shapes)
    if isinstance(module, fx.GraphModule) and getattr(module, "_edgeprune_canonical", False):
        return Network(module, shapes, origin)
    was_training = module.training
    module.eval()
    try:
        program = export(module, shapes, origin, strict)
    finally:
        module.train(was_training)
    return lift_program(program, shapes, origin)


def lift_program(
    program: torch.export.ExportedProgram, input_shapes: Sequence[Sequence[int]] | None = None, origin: str = "model"
) -> Network:
    """Bring an exported program to the canonical form; without ``input_shapes`` those it was exported with count."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    if input_shapes is None:
        names = program.graph_signature.user_inputs
        by_name = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        input_shapes = [[_hint(d) for d in by_name[n].meta["val"].shape] for n in names]
    return lift_graph(module, input_shapes, origin)


def lift_graph(module: fx.GraphModule, input_shapes: Sequence[Sequence[int]], origin: str) -> Network:
    """Bring a flat graph of ATen calls on attributes to the canonical form."""
    shapes = tuple((1, *(int(d) for d in shape[1:])) for shape in input_shapes)
    network = Network(_Lifter(module, origin).lifted(), shapes, origin)
    check(network)
    return network


def _hint(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint)


def export(
    module: nn.Module, shapes: Sequence[Sequence[int]], origin: str, strict: bool = True
) -> torch.export.ExportedProgram:
    """``torch.export`` with batch, height and width dynamic if the model allows it, else the batch only.

    Raises UnsupportedModelError when the module cannot be traced at these shapes (one per input, batch in front).
    """
    auto = torch.export.Dim.AUTO
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    inputs = tuple(torch.randn(2, *shape[1:], device=device) for shape in shapes)
    spatial = tuple({0: auto, **dict.fromkeys(range(2, len(s)), auto)} for s in shapes)
    batch = tuple({0: auto} for _ in shapes)
    error: Exception | None = None
    for dynamic in (spatial, batch):
        for analysed in (False, True) if strict else (False,):
            try:
                arguments = _by_argument(module, dynamic)
                return torch.export.export(module, inputs, dynamic_shapes=arguments, strict=analysed)
            except EdgepruneError:
                raise
            except Exception as e:  # torch.export raises many kinds; the last one is shown
                error = error or e
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    raise UnsupportedModelError(
        f"{origin}: torch.export cannot trace it at input {', '.join('x'.join(map(str, s)) for s in shapes)}: {reason}"
    )


def _by_argument(module: nn.Module, dynamic: tuple[dict[int, Any], ...]) -> Any:
    """``forward(*args)`` wants its dynamic shapes nested once more."""
    import inspect

    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (dynamic,)
    return dynamic


class _Lifter:
    def __init__(self, module: fx.GraphModule, origin: str):
        self.source = module
        self.origin = origin
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.modules: dict[tuple[Any, ...], str] = {}
        self.attributes: dict[str, fx.Node] = {}

    def lifted(self) -> fx.GraphModule:
        for node in self.source.graph.nodes:
            if node.op == "call_module" or (node.op == "call_function" and _is_check(node.target)):
                continue  # shape guards and assertions
            if node.op == "get_attr":
                continue  # made where it is used bare
            self.env[node] = self._emit(node)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        result = fx.GraphModule(self.root, self.graph)
        result.eval()
        result._edgeprune_canonical = True  # type: ignore[assignment]
        return result

    def _emit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.graph.placeholder(node.name)
        if node.op == "output":
            outputs = self._map(node.args[0])
            return self.graph.output(
                outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs
            )
        if node.op != "call_function":
            raise UnsupportedModelError(f"{self.origin}: graph node {node.name} ({node.op}) is not understood")
        target = node.target
        if target in _NO_OPS:
            return self._map(node.args[0])
        path = self._module_for(node)
        if path is not None:
            return self.graph.create_node("call_module", path, (self._map(node.args[0]),), {}, node.name)
        schema = getattr(target, "_schema", None)
        if schema is not None and schema.is_mutable:
            target = self._functional(target)
        return self.graph.create_node("call_function", target, self._map(node.args), self._map(node.kwargs), node.name)

    def _functional(self, target: Any) -> Any:
        """relu_ becomes relu: export keeps in-place overloads whose result is used like any other."""
        packet = getattr(aten, target._opname.rstrip("_"), None)
        overload = getattr(packet, target._overloadname, None) if packet is not None else None
        if overload is None or overload._schema.is_mutable:
            raise UnsupportedModelError(f"{self.origin}: in-place operator {target} has no functional form")
        return overload

    def _map(self, value: Any) -> Any:
        return fx.node.map_arg(value, self._value)

    def _value(self, node: fx.Node) -> Any:
        if node.op != "get_attr":
            return self.env[node]
        name = str(node.target)
        if name not in self.attributes:
            value = _get(self.source, name)
            if isinstance(value, nn.Parameter):
                place(self.root, name, value)
            else:
                place(self.root, name, value, buffer=True)
            with self.graph.inserting_after(_last_placeholder(self.graph)):
                self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    def _tensor(self, value: Any) -> torch.Tensor | None:
        return _get(self.source, str(value.target)) if isinstance(value, fx.Node) and value.op == "get_attr" else None

    def _module_for(self, node: fx.Node) -> str | None:
        """The path of the module that this call becomes, or None if it stays a call."""
        target, args = node.target, _bound(node)
        if target in _DROPOUT_OPS:
            return self._new(("dropout", node.name), f"{node.name}", _DROPOUT_OPS[target](float(args["p"])))
        if target is aten.batch_norm.default:
            return self._batch_norm(args, node)
        names = ("input", "weight", "bias")
        if (
            target in _CONV_OPS
            or target in _CONV_PADDING_OPS
            or target in _TRANSPOSE_OPS
            or target is aten.linear.default
        ):
            weight, bias = self._tensor(args[names[1]]), self._tensor(args[names[2]])
            if weight is None or (bias is None and args[names[2]] is not None):
                return None
            return self._weighted(target, args, weight, bias)
        return None

    def _weighted(self, target: Any, args: dict[str, Any], weight: torch.Tensor, bias: torch.Tensor | None) -> str:
        path = _owner(str(args["weight"].target), "weight")
        has_bias = bias is not None
        if target is aten.linear.default:
            module: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
            key: tuple[Any, ...] = ("linear",)
        elif target in _TRANSPOSE_OPS:
            rank, groups = _TRANSPOSE_OPS[target], args["groups"]
            geometry = {k: _spread(args[k], rank) for k in ("stride", "padding", "output_padding", "dilation")}
            kind: Any = CONV_TRANSPOSES[rank - 1]
            module = kind(
                weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]),
                groups=groups, bias=has_bias, device="meta", **geometry,
            )  # fmt: skip
            key = ("transpose", groups, *geometry.values())
        else:
            rank = _CONV_OPS.get(target) or _CONV_PADDING_OPS[target]
            groups = args["groups"]
            padding = args["padding"] if isinstance(args["padding"], str) else _spread(args["padding"], rank)
            stride, dilation = _spread(args["stride"], rank), _spread(args["dilation"], rank)
            kind = CONVS[rank - 1]
            module = kind(
                weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), stride=stride, padding=padding,
                dilation=dilation, groups=groups, bias=has_bias, device="meta",
            )  # fmt: skip
            key = ("conv", groups, stride, padding, dilation)
        module.weight = _parameter(weight)  # type: ignore[assignment]
        if bias is not None:
            module.bias = _parameter(bias)  # type: ignore[assignment]
        return self._new((*key, id(weight), id(bias)), path, module)

    def _batch_norm(self, args: dict[str, Any], node: fx.Node) -> str | None:
        mean, var = self._tensor(args["running_mean"]), self._tensor(args["running_var"])
        if mean is None or var is None or args["training"]:
            return None  # statistics of the batch itself: stays a call
        weight, bias = self._tensor(args["weight"]), self._tensor(args["bias"])
        rank = node.meta["val"].dim() if "val" in node.meta else 4
        module = BATCH_NORMS[max(rank, 3) - 3](
            mean.shape[0], eps=args["eps"], momentum=args["momentum"], affine=False, device="meta"
        )
        module.running_mean, module.running_var = mean.detach(), var.detach()
        module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        module.affine = True
        module.weight = _parameter(weight if weight is not None else torch.ones_like(mean))
        module.bias = _parameter(bias if bias is not None else torch.zeros_like(mean))
        path = _owner(str(args["running_mean"].target), "running_mean")
        return self._new(("batch_norm", id(mean), id(weight), id(bias), args["eps"]), path, module)

    def _new(self, key: tuple[Any, ...], path: str, module: nn.Module) -> str:
        if key not in self.modules:
            taken = set(self.modules.values())
            free = path
            while free in taken or _exists(self.root, free):
                free += "_"
            place(self.root, free, module)
            self.modules[key] = free
        return self.modules[key]


def rename_inputs(module: fx.GraphModule, names: Sequence[str]) -> None:
    """Give the inputs of a graph these names, as far as there are any, in place."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=False):
        if node.name != name:
            node._rename(name)
            node.target = node.name
    module.recompile()


def _is_check(target: Any) -> bool:
    name = getattr(target, "__name__", "") or str(target)
    return any(w in name or w in str(target) for w in ("_assert", "sym_constrain_range", "_guard"))


def _bound(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=True)


def _owner(attribute: str, leaf: str) -> str:
    """layer1.0.conv1.weight -> layer1.0.conv1; an oddly named weight becomes a module of its own name."""
    path, _, last = attribute.rpartition(".")
    return path if last == leaf and path else attribute


def _get(module: nn.Module, name: str) -> Any:
    return operator.attrgetter(name)(module)


def _exists(root: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(root)
        return True
    except AttributeError:
        return False


def place(root: nn.Module, path: str, value: Any, buffer: bool = False) -> None:
    """Set ``value`` at a dotted path below ``root``, making plain modules on the way."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if buffer and isinstance(value, torch.Tensor):
        root.register_buffer(leaf, value)
    else:
        setattr(root, leaf, value)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [n for n in graph.nodes if n.op == "placeholder"][-1]
