"""A torch module or an exported program becomes a Network: exported weights are lifted back into modules.

``torch.export`` gives a flat graph of ATen calls on weight attributes. Convolutions, linears, batch norms and dropouts
become modules again (leaves.py), so that they can be cut, trained and folded; every other call stays as it is. Weights
that the forward computes from other weights become plain ones (constants.py). All weights are single precision.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph import leaves
from edgeprune.graph.aliases import has_hidden_writes
from edgeprune.graph.batch import free_batch
from edgeprune.graph.constants import Constants
from edgeprune.graph.contexts import inline_contexts
from edgeprune.graph.network import Network, check
from edgeprune.graph.trace import OTHER_FLOATS, export, functional, quiet

aten = torch.ops.aten

_NO_OPS = {
    aten.detach.default, aten.detach_.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default,
}  # fmt: skip
_END = (1 << 63) - 1


def lift(
    module: nn.Module, input_shapes: Sequence[Sequence[int]], origin: str = "model", strict: bool = True
) -> Network:
    """Bring an ``nn.Module`` to the canonical form.

    input_shapes: one shape per input, batch in front (any value), e.g. [(1, 3, 224, 224)].
    strict: whether a module that cannot be traced as it runs may be analysed as byte code (slower, sees branches)
    The module may be in training mode and in any precision; it is left as it was, and shares its float32 weights.
    Raises UnsupportedModelError when ``torch.export`` cannot trace the module at these shapes.
    """
    shapes = tuple((1, *(int(d) for d in shape[1:])) for shape in input_shapes)
    if isinstance(module, fx.GraphModule) and getattr(module, "_edgeprune_canonical", False):
        return Network(module, shapes, origin)
    return lift_program(export(module, shapes, origin, strict), shapes, origin)


def lift_program(
    program: torch.export.ExportedProgram, input_shapes: Sequence[Sequence[int]] | None = None, origin: str = "model"
) -> Network:
    """Bring an exported program to the canonical form; without ``input_shapes`` those it was exported with count."""
    with quiet():
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    names = program.graph_signature.user_inputs
    by_name = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    values = [by_name[n].meta["val"] for n in names if isinstance(n, str)]
    if input_shapes is None:
        input_shapes = [[_hint(d) for d in v.shape] for v in values]
    baked = values[0].shape[0] if values and values[0].dim() and isinstance(values[0].shape[0], int) else None
    return lift_graph(module, input_shapes, origin, baked)


def lift_graph(
    module: fx.GraphModule, input_shapes: Sequence[Sequence[int]], origin: str, baked_batch: int | None = None
) -> Network:
    """Bring a flat graph of ATen calls on attributes to the canonical form.

    baked_batch: the batch size that the graph was made with, if it was made for that one only
    """
    shapes = tuple((1, *(int(d) for d in shape[1:])) for shape in input_shapes)
    inline_contexts(module)
    if has_hidden_writes(module.graph):
        module = functional(module, shapes, origin)
    network = Network(_Lifter(module, origin).lifted(), shapes, origin)
    check(network)
    if baked_batch is not None:
        free_batch(network, baked_batch)
    return network


def rename_inputs(module: fx.GraphModule, names: Sequence[str]) -> None:
    """Give the inputs of a graph these names, as far as there are any, in place."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=False):
        if node.name != name:
            node._rename(name)
            node.target = node.name
    module.recompile()


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


def _hint(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint)


class _Lifter:
    def __init__(self, module: fx.GraphModule, origin: str):
        self.source = module
        self.constants = Constants(module)
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
        self._place_attributes()
        result = fx.GraphModule(self.root, self.graph)
        if any(t.dtype in OTHER_FLOATS for t in (*result.parameters(), *result.buffers())):
            result = copy.deepcopy(result).float()  # the source keeps its precision
        result.eval()
        result._edgeprune_canonical = True  # type: ignore[assignment]
        return result

    def _emit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.graph.placeholder(node.name)
        if node.op == "output":
            return self.graph.output(self._outputs(node.args[0]))
        if node.op != "call_function":
            raise UnsupportedModelError(f"{self.origin}: graph node {node.name} ({node.op}) is not understood")
        target = node.target
        if target in _NO_OPS or _is_whole_slice(node) or _is_plain_copy(node):
            return self._map(node.args[0])
        if target is operator.getitem and isinstance(self.env.get(node.args[0]), tuple):  # type: ignore[arg-type]
            return self.env[node.args[0]][node.args[1]]  # type: ignore[index]
        called = self._module_for(node)
        if called is not None:
            path, x = called
            made = self.graph.create_node("call_module", path, (self._map(x),), {}, node.name)
            return (made, None, None) if target is leaves.DECOMPOSED_NORM else made
        schema = getattr(target, "_schema", None)
        if schema is not None and schema.is_mutable:
            target = self._functional(target)
        args, kwargs = self._map(_single(node.args)), self._map(_single(node.kwargs))
        return self.graph.create_node("call_function", target, args, kwargs, node.name)

    def _outputs(self, value: Any) -> Any:
        outputs = self._map(value)
        if not isinstance(outputs, (tuple, list)):
            return outputs
        tensors = tuple(o for o in outputs if isinstance(o, fx.Node))
        if not tensors:
            raise UnsupportedModelError(f"{self.origin}: returns no tensor")
        return tensors[0] if len(tensors) == 1 else tensors

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
            value = operator.attrgetter(name)(self.source)
            if not isinstance(value, torch.Tensor):
                raise UnsupportedModelError(
                    f"{self.origin}: forward holds a sub-graph (a condition or a loop on values); remove it"
                )
            with self.graph.inserting_after(_last_placeholder(self.graph)):
                self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    def _place_attributes(self) -> None:
        """The tensors that are still used bare, beside the modules: under their own names unless those are taken."""
        for node in self.graph.nodes:
            if node.op == "get_attr":
                value, path = operator.attrgetter(node.target)(self.source), node.target
                while _exists(self.root, path) and operator.attrgetter(path)(self.root) is not value:
                    path += "_"
                if not _exists(self.root, path):
                    place(self.root, path, value, buffer=not isinstance(value, nn.Parameter))
                node.target = path

    def _module_for(self, node: fx.Node) -> tuple[str, Any] | None:
        """The path of the module that this call becomes and the call's input, or None if it stays a call."""
        target, args = node.target, leaves.bound(node)
        if target in leaves.DROPOUTS:
            module = leaves.DROPOUTS[target](float(args["p"]))
            return self._new(("dropout", node.name), node.name, module), args.get("input", args.get("self"))
        if target in leaves.NORMS:
            return self._norm(node, args)
        if target in leaves.WEIGHTED:
            return self._weighted(target, args)
        linear = leaves.as_linear(node)
        if linear is not None:
            return self._weighted(aten.linear.default, dict(zip(("input", "weight", "bias"), linear, strict=True)))
        return None

    def _weighted(self, target: Any, args: dict[str, Any]) -> tuple[str, Any] | None:
        weight, bias = self.constants.tensor(args["weight"]), self.constants.tensor(args["bias"])
        if weight is None or (bias is None and args["bias"] is not None):
            return None
        module, key = leaves.weighted(target, args, weight, bias)
        path = self.constants.path(args["weight"], "weight")
        owner, _, leaf = str(getattr(args["bias"], "target", "")).rpartition(".")
        if leaf == "bias" and owner and args["bias"].op == "get_attr":
            path = owner  # a weight shared by two modules has the name of one; their biases tell them apart
        return self._new((*key, id(weight), id(bias)), path, module), args["input"]

    def _norm(self, node: fx.Node, args: dict[str, Any]) -> tuple[str, Any] | None:
        """Whatever mode it was exported in: with running statistics it is a batch norm."""
        mean, var = self.constants.tensor(args["running_mean"]), self.constants.tensor(args["running_var"])
        weight, bias = self.constants.tensor(args["weight"]), self.constants.tensor(args["bias"])
        if mean is None or var is None:
            return None  # statistics of the batch itself: stays a call
        if (weight is None and args["weight"] is not None) or (bias is None and args["bias"] is not None):
            return None
        value = node.meta.get("val")
        value = value[0] if isinstance(value, (tuple, list)) else value
        module = leaves.norm(4 if value is None else value.dim(), args, mean, var, weight, bias)
        path = self.constants.path(args["running_mean"], "running_mean")
        return self._new(("batch_norm", id(mean), id(weight), id(bias), args["eps"]), path, module), args["input"]

    def _new(self, key: tuple[Any, ...], path: str, module: nn.Module) -> str:
        if key not in self.modules:
            taken = set(self.modules.values())
            free = path
            while free in taken or _exists(self.root, free):
                free += "_"
            place(self.root, free, module)
            self.modules[key] = free
        return self.modules[key]


def _is_check(target: Any) -> bool:
    name = getattr(target, "__name__", "") or str(target)
    return any(w in name or w in str(target) for w in ("_assert", "sym_constrain_range", "_guard"))


def _is_whole_slice(node: fx.Node) -> bool:
    """x[:]: exporting leaves one for every untouched dimension in front of a sliced one."""
    if node.target is not aten.slice.Tensor:
        return False
    args = leaves.bound(node)
    return args["start"] in (None, 0) and args["end"] in (None, _END) and args["step"] == 1


def _is_plain_copy(node: fx.Node) -> bool:
    """A clone; one that makes the memory contiguous stays, a ``view`` behind it may need that."""
    return node.target is aten.clone.default and node.kwargs.get("memory_format") is None


def _single(value: Any) -> Any:
    """Arguments that name half or double precision name single precision."""
    return fx.node.map_aggregate(
        value, lambda v: torch.float32 if isinstance(v, torch.dtype) and v in OTHER_FLOATS else v
    )


def _exists(root: nn.Module, path: str) -> bool:
    try:
        operator.attrgetter(path)(root)
        return True
    except AttributeError:
        return False


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [n for n in graph.nodes if n.op == "placeholder"][-1]
