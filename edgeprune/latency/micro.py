"""Many kernels -> one ONNX model of parallel branches, so that one session measures them all.

A kernel that finds its inputs in the runtime's blocked layout stands between two cheap convolutions (one behind each
input, one behind the output that reads a single pixel); one that finds them plain stands behind a Neg. The node is
rebuilt from the kernel alone: weights and constants follow from its shapes and attributes. Large constants are left
open ("external"), named in ``Micro.weights`` and made on the device, so that hardly any bytes travel.

Every tensor and node carries its branch: ``k3_`` belongs to kernel 3, ``p3_`` stands before and ``q3_`` behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeprune.errors import TableError
from edgeprune.latency.kernel import Kernel, Shape, parse_shape

OPSET = 18
IR_VERSION = 8  # devices keep old runtimes; nothing here needs a newer one
INLINE_ELEMENTS = 64  # constants up to this size lie in the model itself


@dataclass(slots=True)
class Micro:
    """``weights``: [name, dims, scale] of the constants the device makes."""

    model: bytes
    weights: list[list[Any]]
    weight_bytes: int


def build(kernels: Sequence[Kernel]) -> Micro:
    """One model holding every kernel once. Raises TableError for a kernel that cannot be rebuilt, naming it."""
    writer = _Writer()
    for index, kernel in enumerate(kernels):
        try:
            writer.branch(index, kernel)
        except (ValueError, IndexError, KeyError, ZeroDivisionError, onnx.defs.SchemaError) as error:
            raise TableError(f"kernel {kernel.key()} cannot be rebuilt: {error}") from None
    return writer.finish()


def build_chain(kernels: Sequence[Kernel]) -> Micro:
    """A small network: the kernels one behind the other. Each has one input, of the shape of the output before it."""
    writer = _Writer(prefix="p0_")
    tensor = writer.before(kernels[0].inputs[0], "b")
    for index, kernel in enumerate(kernels):
        writer.prefix = f"k{index}_"
        tensor = writer.kernel(kernel, [tensor])[0]
    writer.prefix = "q0_"
    writer.behind(tensor, kernels[-1].output)
    return writer.finish()


def weight_bytes(kernel: Kernel) -> int:
    """Bytes of the kernel's constants, for sizing a batch."""
    if kernel.op in ("Conv", "ConvTranspose"):
        taps = math.prod(parse_shape(kernel.attr("kernel_shape")))
        return 4 * kernel.inputs[0][1] * kernel.output[1] * taps // _groups(kernel)
    if kernel.op in ("Gemm", "MatMul") and kernel.inputs:
        return 4 * kernel.inputs[0][-1] * kernel.output[-1]
    return 0


def _groups(kernel: Kernel) -> int:
    group = kernel.attr("group", "1")
    return kernel.inputs[0][1] if group == "dw" else int(group)


@dataclass(slots=True)
class _Writer:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    weights: list[list[Any]] = field(default_factory=list)
    inputs: dict[str, Shape] = field(default_factory=dict)
    sources: dict[Shape, str] = field(default_factory=dict)
    outputs: list[tuple[str, Shape | None]] = field(default_factory=list)
    prefix: str = ""
    opset: int = OPSET

    def finish(self) -> Micro:
        f32 = TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info(name, f32, shape) for name, shape in self.inputs.items()]
        outputs = [
            helper.make_tensor_value_info(name, f32, shape) if shape is not None else onnx.ValueInfoProto(name=name)
            for name, shape in self.outputs
        ]
        graph = helper.make_graph(self.nodes, "micro", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSION)
        size = sum(4 * math.prod(dims) for _, dims, _ in self.weights)
        return Micro(model.SerializeToString(), self.weights, size)

    # the parts of a branch

    def branch(self, index: int, kernel: Kernel) -> None:
        letters, _, out = kernel.attr("io", "b" * len(kernel.inputs) + ">b").partition(">")
        if len(letters) != len(kernel.inputs):
            raise ValueError(f"io {kernel.attr('io')!r} does not fit {len(kernel.inputs)} inputs")
        self.prefix = f"p{index}_"
        inputs = [self.before(shape, letter) for shape, letter in zip(kernel.inputs, letters, strict=True)]
        self.prefix = f"k{index}_"
        results = self.kernel(kernel, inputs)
        for result in results[1:]:
            self.outputs.append((result, None))
        self.prefix = f"q{index}_"
        if out == "b" and len(kernel.output) == 4:
            self.behind(results[0], kernel.output)
        else:
            self.outputs.append((results[0], kernel.output))

    def before(self, shape: Shape, letter: str) -> str:
        if letter == "b" and len(shape) == 4:
            source = self.sources.setdefault((1, 1, *shape[2:]), f"x{len(self.inputs)}")
            if source not in self.inputs:
                self.inputs[source] = (1, 1, *shape[2:])
            weight = self.weight((shape[1], 1, 1, 1), 1.0)
            conv = self.node("Conv", [source, weight, self.weight((shape[1],), 1.0)], kernel_shape=[1, 1])
            return self.node("LeakyRelu", [conv])  # an activation keeps the runtime from fusing a sum into this one
        source = f"x{len(self.inputs)}"  # its own: equal branches would be merged, and a reorder shared
        self.inputs[source] = shape
        return self.node("Neg", [source])

    def behind(self, tensor: str, shape: Shape) -> None:
        weight = self.weight((1, shape[1], 1, 1), 1.0)
        pixel = self.node("Conv", [tensor, weight], kernel_shape=[1, 1], strides=list(shape[2:]))
        self.outputs.append((pixel, (1, 1, 1, 1)))

    def node(self, op: str, inputs: Sequence[str], **attrs: Any) -> str:
        return self.node_outputs(op, inputs, 1, **attrs)[0]

    def node_outputs(self, op: str, inputs: Sequence[str], outputs: int, **attrs: Any) -> list[str]:
        names = [f"{self.prefix}t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"{self.prefix}n{len(self.nodes)}", **attrs))
        return names

    def constant(self, values: object, dtype: type = np.int64) -> str:
        name = f"{self.prefix}c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, dims: Shape, scale: float) -> str:
        """A float constant with values of about ``scale``."""
        if math.prod(dims) <= INLINE_ELEMENTS:
            values = np.random.default_rng(len(self.constants)).uniform(0.5, 1.0, dims) * scale
            return self.constant(values, np.float32)
        name = f"{self.prefix}w{len(self.weights)}"
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=name)
        self.constants.append(tensor)
        self.weights.append([name, list(dims), scale])
        return name

    # the kernel itself

    def kernel(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        rebuild = _REBUILD.get(kernel.op, _Writer.generic)
        used = len(inputs) - kernel.tail.count("Add")
        results = rebuild(self, kernel, inputs[:used])
        rest = iter(inputs[used:])
        for op in kernel.tail:
            if op == "Add":
                results = [self.node("Add", [results[0], next(rest)])]
            elif op == "Mul":  # x * sigmoid(x)
                results = [self.node("Mul", [inputs[0], results[0]])]
            elif op == "Gelu":
                continue
            elif op == "Clip":
                low, high = self.constant(0.0, np.float32), self.constant(6.0, np.float32)
                results = [self.node("Clip", [results[0], low, high])]
            else:
                results = [self.node(op, results[:1])]
        return results

    def window(self, kernel: Kernel) -> dict[str, list[int]]:
        names = ("kernel_shape", "strides", "pads", "dilations", "output_padding")
        return {name: list(parse_shape(kernel.attr(name))) for name in names if kernel.attr(name)}

    def conv(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        groups = _groups(kernel)
        attrs = self.window(kernel)
        c_in, c_out, taps = kernel.inputs[0][1], kernel.output[1], attrs["kernel_shape"]
        if c_in % groups or c_out % groups:
            raise ValueError(f"{c_in} -> {c_out} channels do not divide into {groups} groups")
        dims = (c_out, c_in // groups, *taps) if kernel.op == "Conv" else (c_in, c_out // groups, *taps)
        scale = 1.0 / math.sqrt(c_in // groups * math.prod(taps))
        operands = [inputs[0], self.weight(dims, scale), self.weight((c_out,), 0.1)]
        return [self.node(kernel.op, operands, group=groups, **attrs)]

    def pool(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        extra = {name: int(kernel.attr(name)) for name in ("ceil_mode", "count_include_pad") if kernel.attr(name)}
        attrs = {**self.window(kernel), **extra}
        if kernel.op != "MaxPool":
            attrs.pop("dilations")  # known to newer operator sets only
        return [self.node(kernel.op, inputs, **attrs)]

    def matmul(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        if len(inputs) == 2:
            return [self.node("MatMul", inputs)]
        shape, out = kernel.inputs[0], kernel.output
        if kernel.attr("c0"):
            return [self.node("MatMul", [self.weight((out[-2], shape[-2]), 1 / math.sqrt(shape[-2])), *inputs])]
        scale = 1 / math.sqrt(shape[-1])
        if kernel.op == "MatMul":
            return [self.node("MatMul", [*inputs, self.weight((shape[-1], out[-1]), scale)])]
        weight = self.weight((out[-1], shape[-1]), scale)
        return [self.node("Gemm", [*inputs, weight, self.weight(out[-1:], 0.1)], transB=1)]

    def reshape(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        return [self.node("Reshape", [*inputs, self.constant(kernel.output)])]

    def slice(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        shape, out = kernel.inputs[0], kernel.output
        steps = [int(s) for s in kernel.attr("steps", ",".join("1" * len(shape))).split(",")]
        starts = [0 if step > 0 else size - 1 for size, step in zip(shape, steps, strict=True)]
        ends = [
            (o - 1) * step + 1 if step > 0 else size - 1 + (o - 1) * step - 1
            for size, o, step in zip(shape, out, steps, strict=True)
        ]
        ends = [end if end >= 0 else -size - 1 for end, size in zip(ends, shape, strict=True)]
        axes = list(range(len(shape)))
        return [self.node("Slice", [*inputs, *(self.constant(v) for v in (starts, ends, axes, steps))])]

    def pad(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        extra = [o - i for i, o in zip(kernel.inputs[0], kernel.output, strict=True)]
        amounts = [e // 2 for e in extra] + [e - e // 2 for e in extra]
        return [self.node("Pad", [*inputs, self.constant(amounts)], mode=kernel.attr("mode", "constant"))]

    def split(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        axis, count = int(kernel.attr("axis", "0")), int(kernel.attr("num_outputs"))
        total, first = kernel.inputs[0][axis], kernel.output[axis]
        sizes = [first]
        for left in range(count - 1, 0, -1):
            sizes.append((total - sum(sizes)) // left)
        return self.node_outputs("Split", [*inputs, self.constant(sizes)], count, axis=axis)

    def resize(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        return [self.node("Resize", [*inputs, "", "", self.constant(kernel.output)], **self.typed(kernel))]

    def expand(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        return [self.node("Expand", [*inputs, self.constant(kernel.output)])]

    def tile(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        repeats = [o // i for i, o in zip(kernel.inputs[0], kernel.output, strict=True)]
        return [self.node("Tile", [*inputs, self.constant(repeats)])]

    def gather(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        axis = int(kernel.attr("axis", "0"))
        shape = parse_shape(kernel.attr("indices"))
        if len(shape) == 1:
            shape = (kernel.output[axis],)
        indices = np.random.default_rng(0).integers(0, kernel.inputs[0][axis], shape)
        return [self.node(kernel.op, [*inputs, self.constant(indices)], axis=axis)]

    def clip(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        return [self.node("Clip", [*inputs, self.constant(0.0, np.float32), self.constant(6.0, np.float32)])]

    def gelu(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        if kernel.tail != ("Gelu",):
            return [self.node("Erf", inputs)]
        root, one, half = (self.constant(value, np.float32) for value in (math.sqrt(2), 1.0, 0.5))
        erf = self.node("Erf", [self.node("Div", [*inputs, root])])
        product = self.node("Mul", [*inputs, self.node("Add", [erf, one])])
        return [self.node("Mul", [product, half])]

    def generic(self, kernel: Kernel, inputs: list[str]) -> list[str]:
        """Any other operator: activation inputs and float constants in their places, attributes by its schema."""
        constants = {
            int(name[1:]): value for name, value in kernel.attrs if name[0] == "c" and name[1:].isdigit()
        }  # fmt: skip
        left = list(inputs)
        operands = []
        for position in range(len(inputs) + len(constants)):
            if position in constants:
                operands.append(self.broadcast(constants[position], kernel))
            else:
                operands.append(left.pop(0))
        if kernel.op.startswith("Reduce") and kernel.attr("axes"):
            operands.append(self.constant([int(v) for v in kernel.attr("axes").split(",")]))
        schema = onnx.defs.get_schema(kernel.op, 22)
        self.opset = max(self.opset, schema.since_version if schema.since_version <= 20 else OPSET)
        return [self.node(kernel.op, operands, **self.typed(kernel))]

    def broadcast(self, pattern: str, kernel: Kernel) -> str:
        if ":" in pattern:
            dtype, _, shape = pattern.partition(":")
            return self.constant(np.zeros(parse_shape(shape)), np.dtype(dtype).type)
        if pattern == "-1":
            return self.weight((kernel.inputs[0][1],), 1.0)
        dims = parse_shape(pattern)
        reference = kernel.output[len(kernel.output) - len(dims) :]
        return self.weight(tuple(r if d == 0 else d for d, r in zip(dims, reference, strict=True)), 1.0)

    def typed(self, kernel: Kernel) -> dict[str, Any]:
        schema = onnx.defs.get_schema(kernel.op, OPSET)
        kinds = {name: attribute.type for name, attribute in schema.attributes.items()}
        attrs: dict[str, Any] = {}
        for name, text in kernel.attrs:
            if name in kinds and not (name == "axes" and kernel.op.startswith("Reduce")):
                attrs[name] = _PARSE[kinds[name]](text)
        return attrs


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


_Kind = onnx.defs.OpSchema.AttrType
_PARSE: dict[object, Callable[[str], object]] = {
    _Kind.INT: int,
    _Kind.FLOAT: float,
    _Kind.STRING: str,
    _Kind.INTS: _ints,
    _Kind.FLOATS: _floats,
}

_REBUILD: dict[str, Callable[[_Writer, Kernel, list[str]], list[str]]] = {
    "Conv": _Writer.conv,
    "ConvTranspose": _Writer.conv,
    "MaxPool": _Writer.pool,
    "AveragePool": _Writer.pool,
    "LpPool": _Writer.pool,
    "Gemm": _Writer.matmul,
    "MatMul": _Writer.matmul,
    "Reshape": _Writer.reshape,
    "Slice": _Writer.slice,
    "Pad": _Writer.pad,
    "Split": _Writer.split,
    "Resize": _Writer.resize,
    "Expand": _Writer.expand,
    "Tile": _Writer.tile,
    "Gather": _Writer.gather,
    "Clip": _Writer.clip,
    "Erf": _Writer.gelu,
}
