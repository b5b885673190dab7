"""Appends nodes and initializers to an ONNX graph: what the rows of the operator table write with.

    Edge      a tensor that is computed when the file runs: its name, shape (batch 1) and dtype
    Emitter   the file being written
    Call      one call of the network, to its row: ``call.add`` makes helper tensors, ``call.out`` the result

A row is a function ``row(call, arguments) -> value``. Arguments are bound to the names of the operator's schema, and
are Edges, torch tensors (constants), Python numbers, or lists of these. The value is an Edge, a constant, or a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import UnsupportedModelError

OPSET = 17
IR_VERSION = 8

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
_SHARED_NUMEL = 4096  # constants up to this size are stored once however often they occur


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor of the graph. ``meta`` is a contiguous tensor on the meta device with its shape and dtype."""

    name: str
    meta: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.meta.shape)

    @property
    def rank(self) -> int:
        return self.meta.dim()

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype


def blank(meta: torch.Tensor) -> torch.Tensor:
    """Shape and dtype only. ONNX tensors have no strides, and any view of a contiguous tensor is valid."""
    return torch.empty(meta.shape, dtype=meta.dtype, device="meta")


class Emitter:
    """Nodes, initializers and value infos in the order they are made. ``reserved``: names that belong to nodes of the
    network, so that no helper tensor takes one."""

    def __init__(self, origin: str, reserved: Sequence[str] = ()):
        self.origin = origin
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.edges: dict[str, Edge] = {}  # tensors of known shape
        self.names: dict[int, str] = {}  # id of a constant -> the name it should get
        self._taken = set(reserved)
        self._producers: dict[str, onnx.NodeProto] = {}
        self._node_names: set[str] = set()
        self._by_id: dict[int, tuple[torch.Tensor, str]] = {}
        self._by_content: dict[tuple[Any, ...], str] = {}

    def fresh(self, name: str) -> str:
        """``name``, or the first of name.2, name.3, ... that no tensor has yet."""
        free, number = name, 2
        while free in self._taken:
            free, number = f"{name}.{number}", number + 1
        self._taken.add(free)
        return free

    def constant(self, tensor: torch.Tensor, name: str) -> str:
        """The name of the initializer that holds ``tensor``; ``name`` is used if it is new and nameless."""
        if id(tensor) in self._by_id:
            return self._by_id[id(tensor)][1]
        array = tensor.detach().cpu().contiguous().numpy()
        if tensor.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{self.origin}: constant {name} has dtype {tensor.dtype}, which is not exported"
            )
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= _SHARED_NUMEL else None
        found = self._by_content.get(key) if key is not None else None
        if found is None:
            found = self.fresh(self.names.get(id(tensor), name))
            self.initializers[found] = numpy_helper.from_array(array, found)
            if key is not None:
                self._by_content[key] = found
        self._by_id[id(tensor)] = (tensor, found)  # kept alive, so that the id stays its own
        return found

    def producer(self, edge: Edge) -> onnx.NodeProto | None:
        """The node that computes ``edge``; None for an input."""
        return self._producers.get(edge.name)

    def value(self, name: str) -> np.ndarray | None:
        """What the initializer ``name`` holds."""
        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, attributes: dict[str, Any]
    ) -> None:
        free, number = name, 2
        while free in self._node_names:
            free, number = f"{name}.{number}", number + 1
        self._node_names.add(free)
        given = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), free, **given))
        self._producers.update(dict.fromkeys(outputs, self.nodes[-1]))


class Call:
    """One node of the network. ``name``: its fx name, which its output tensor gets; ``label``: the ONNX node name;
    ``meta``: what it returns, on the meta device."""

    def __init__(self, emitter: Emitter, name: str, label: str, meta: Any, outputs: Sequence[str] = ()):
        self.emitter = emitter
        self.name = name
        self.label = label
        self.meta = meta
        self.outputs = outputs  # names for the parts of a tuple result

    def constant(self, value: torch.Tensor | np.ndarray | Sequence[int], name: str = "const") -> str:
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            value = np.asarray(value, np.int64)
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        return self.emitter.constant(value, f"{self.name}.{name}")

    def scalar(self, value: float | bool, dtype: torch.dtype) -> str:
        return self.emitter.constant(torch.tensor(value, dtype=dtype), f"{self.name}.const")

    def tensor(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """The tensor name of an Edge, constant or number, cast to ``dtype`` if it has another."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, (bool, int, float)):
            default = {bool: torch.bool, int: torch.int64, float: torch.float32}[type(value)]
            return self.scalar(value, dtype or default)
        if isinstance(value, torch.Tensor):
            wanted = value if dtype is None or value.dtype == dtype else value.to(dtype)
            return self.emitter.constant(wanted, f"{self.name}.const")
        assert isinstance(value, Edge)
        if dtype is None or value.dtype == dtype:
            return value.name
        return self.add("Cast", value, to=DTYPES[dtype])

    def add(self, op: str, *inputs: Any, label: str | None = None, **attributes: Any) -> str:
        """A helper tensor, by name."""
        output = self.emitter.fresh(f"{self.name}.{(label or op).lower()}")
        self.emitter.node(op, self._names(inputs), [output], f"{self.label}.{(label or op).lower()}", attributes)
        return output

    def out(self, op: str, *inputs: Any, **attributes: Any) -> Edge:
        """The node whose output is the call's result."""
        self.emitter.node(op, self._names(inputs), [self.name], self.label, attributes)
        edge = Edge(self.name, blank(self.meta))
        self.emitter.edges[self.name] = edge
        return edge

    def outs(self, op: str, *inputs: Any, **attributes: Any) -> tuple[Edge, ...]:
        """As ``out``, for a call that returns several tensors of which each is an output of the one node."""
        names = [
            self.outputs[i] if i < len(self.outputs) and self.outputs[i] else self.emitter.fresh(f"{self.name}.{i}")
            for i in range(len(self.meta))
        ]
        self.emitter.node(op, self._names(inputs), names, self.label, attributes)
        edges = tuple(Edge(name, blank(meta)) for name, meta in zip(names, self.meta, strict=True))
        self.emitter.edges.update({edge.name: edge for edge in edges})
        return edges

    def part(self, index: int) -> Call:
        """A call that writes one of several results by a node of its own."""
        named = index < len(self.outputs) and self.outputs[index]
        name = self.outputs[index] if named else self.emitter.fresh(f"{self.name}.{index}")
        return Call(self.emitter, name, name, self.meta[index])

    def refuse(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.emitter.origin}: {self.label} cannot be exported to ONNX: {why}")

    def _names(self, inputs: Sequence[Any]) -> list[str]:
        names = [self.tensor(value) for value in inputs]
        while names and not names[-1]:
            names.pop()
        return names


Arguments = SimpleNamespace
