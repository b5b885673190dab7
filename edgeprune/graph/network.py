"""The one network form. Whatever comes in becomes a ``Network``; everything else in edgeprune works on it.

Canonical means
    nodes    placeholder, get_attr (a bare parameter or buffer), call_module, call_function, output; nothing else
    modules  convolutions (plain and transposed, 1d to 3d), batch norms, linears and dropouts; nothing else
    calls    ATen overloads, ``operator`` functions on sizes, and ``torch.sym_*``; all functional, none in-place
    names    a module or bare parameter keeps the path it had in the user's model
    output   one tensor, or a flat tuple of tensors
    batch    dimension 0 of every input may have any size

A module called twice is one module with two call nodes. All sizes other than the batch (and height and width where
the model allows it) are baked into arguments, and are *refitted* when channels are cut.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from edgeprune.errors import UnsupportedModelError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
LEAVES = (*CONVS, *CONV_TRANSPOSES, *BATCH_NORMS, nn.Linear, *DROPOUTS)


@dataclass(frozen=True, slots=True)
class Network:
    """A canonical graph. ``input_shapes``: one shape per placeholder, batch 1 in front, e.g. ((1, 3, 224, 224),).
    ``origin`` says where it came from, for messages."""

    module: fx.GraphModule
    input_shapes: tuple[tuple[int, ...], ...]
    origin: str

    def copy(self) -> Network:
        return Network(copy.deepcopy(self.module), self.input_shapes, self.origin)

    def random_inputs(self, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Standard normal float32 inputs of shape (batch, *input_shape[1:]), the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch, *shape[1:], generator=generator) for shape in self.input_shapes)

    def modules_called(self) -> dict[str, list[fx.Node]]:
        """Module path -> its call nodes, in graph order."""
        calls: dict[str, list[fx.Node]] = {}
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        return calls


def shapes(network: Network, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Node name -> shape of its output, by one run on the meta device; nodes that return no tensor are left out."""
    meta = _without_values(network.module)
    dtype = next((p.dtype for p in meta.parameters() if p.is_floating_point()), torch.float32)
    recorder = _ShapeRecorder(meta)
    with torch.no_grad():
        recorder.run(*(torch.empty(batch, *s[1:], device="meta", dtype=dtype) for s in network.input_shapes))
    return recorder.shapes


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node):  # type: ignore[no-untyped-def]
        if _makes_a_tensor(n):  # factory calls would allocate
            n = copy.copy(n)
            n._kwargs = {**n.kwargs, "device": torch.device("meta")}  # type: ignore[attr-defined]
        if any(isinstance(a, torch.device) for a in (*n.args, *n.kwargs.values())):  # the device it was exported on
            n = copy.copy(n)
            n._args = fx.node.map_aggregate(n.args, _on_meta)  # type: ignore[attr-defined]
            n._kwargs = fx.node.map_aggregate(n.kwargs, _on_meta)  # type: ignore[attr-defined]
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n.name] = tuple(int(s) for s in result.shape)
        return result


def _without_values(module: fx.GraphModule) -> fx.GraphModule:
    """A copy on the meta device, made without copying a weight."""
    memo: dict[int, torch.Tensor] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    memo.update({id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()})
    return copy.deepcopy(module, memo).to("meta")


def _on_meta(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, torch.device) else value


def _makes_a_tensor(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(a.name == "device" for a in schema.arguments):
        return False
    return not any(isinstance(a.type, torch.TensorType) for a in schema.arguments)


def check(network: Network) -> None:
    """Raise UnsupportedModelError unless the network is canonical (see the module's docstring)."""
    graph = network.module.graph
    graph.lint()
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(network.input_shapes):
        raise UnsupportedModelError(
            f"{network.origin}: {len(placeholders)} inputs in the graph, {len(network.input_shapes)} input shapes"
        )
    for node in graph.nodes:
        if node.op == "call_method":
            raise UnsupportedModelError(f"{network.origin}: method call {node.target} is not canonical")
        if node.op == "call_module":
            leaf = network.module.get_submodule(str(node.target))
            if not isinstance(leaf, LEAVES):
                raise UnsupportedModelError(
                    f"{network.origin}: module {node.target} ({type(leaf).__name__}) is not canonical"
                )
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                raise UnsupportedModelError(f"{network.origin}: in-place operator {node.target} is not canonical")
