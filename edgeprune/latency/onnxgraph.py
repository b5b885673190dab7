"""Read access to an ONNX graph: static shapes, constants, and who reads what."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgeprune.errors import UnsupportedModelError
from edgeprune.latency.kernel import Shape


class OnnxGraph:
    """Nodes that are computed from constants alone are left out; the runtime folds them. Of nodes that compute the
    same thing twice it keeps one: ``twins`` maps that one's name to the names of the others."""

    def __init__(self, model: onnx.ModelProto):
        self._initializers = {t.name: t for t in model.graph.initializer}
        self._arrays: dict[str, np.ndarray] = {}
        self._folded: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.op_type == "Constant":
                self._constant(node)
            elif node.input and all(not name or self.is_const(name) for name in node.input):
                self._folded.update(node.output)
            else:
                self.nodes.append(node)
        self.twins: dict[str, list[str]] = {}
        self.outputs = {value.name for value in model.graph.output}
        self._merge_twins()
        self._shapes = _shapes(model)
        if any(name not in self._shapes for node in self.nodes for name in node.output if name):
            self._shapes = _shapes(onnx.shape_inference.infer_shapes(model, data_prop=True))
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self._uses: dict[str, int] = {}
        for node in self.nodes:
            for name in node.input:
                self._uses[name] = self._uses.get(name, 0) + 1
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._index = {node.output[0]: i for i, node in enumerate(self.nodes)}

    def _constant(self, node: onnx.NodeProto) -> None:
        value = node.attribute[0]
        if value.name == "value":
            self._arrays[node.output[0]] = numpy_helper.to_array(value.t)
        else:
            self._arrays[node.output[0]] = np.asarray(onnx.helper.get_attribute_value(value))

    def _merge_twins(self) -> None:
        alias: dict[str, str] = {}
        first: dict[bytes, onnx.NodeProto] = {}
        kept = []
        for original in self.nodes:
            node = original
            if any(name in alias for name in node.input):
                node = onnx.NodeProto()
                node.CopyFrom(original)
                node.input[:] = [alias.get(name, name) for name in original.input]
            bare = onnx.NodeProto()
            bare.CopyFrom(node)
            bare.ClearField("name")
            bare.ClearField("output")
            twin = first.setdefault(bare.SerializeToString(deterministic=True) + bytes([len(node.output)]), node)
            if twin is node or any(name in self.outputs for name in node.output):
                kept.append(node)
                continue
            self.twins.setdefault(twin.name, []).append(node.name)
            alias.update(zip(node.output, twin.output, strict=True))
        self.nodes = kept

    def is_const(self, name: str) -> bool:
        return name in self._initializers or name in self._arrays or name in self._folded

    def const(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            if name not in self._initializers:
                raise UnsupportedModelError(f"constant {name!r} is computed by nodes; fold constants before exporting")
            self._arrays[name] = numpy_helper.to_array(self._initializers[name])
        return self._arrays[name]

    def shape(self, name: str) -> Shape:
        if name in self._initializers:
            return tuple(self._initializers[name].dims)
        if name in self._arrays:
            return self._arrays[name].shape
        if name not in self._shapes:
            raise UnsupportedModelError(f"tensor {name!r} has no static shape; export with fixed input sizes")
        return self._shapes[name]

    def uses(self, name: str) -> int:
        """How often a tensor is read, as a network output too."""
        return self._uses.get(name, 0) + (name in self.outputs)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return self._readers.get(name, [])

    def index(self, node: onnx.NodeProto) -> int:
        return self._index[node.output[0]]

    def attribute(self, node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        for attribute in node.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default

    def is_per_channel(self, node: onnx.NodeProto) -> bool:
        """Whether the node's constant operand varies along the channels (dimension 1) at most."""
        rank = len(self.shape(node.output[0]))
        for name in node.input:
            if self.is_const(name):
                padded = (1,) * (rank - len(self.shape(name))) + self.shape(name)
                if any(d != 1 for i, d in enumerate(padded) if i != 1):
                    return False
        return True


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]:
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            continue
        dims = tensor.shape.dim
        if all(d.HasField("dim_value") for d in dims):
            found[value.name] = tuple(d.dim_value for d in dims)
    return found
