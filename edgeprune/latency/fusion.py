"""An ONNX network -> the list of kernels the runtime makes of it.

Activations and residual sums disappear into the convolution before them, and onnxruntime's CPU provider keeps tensors
in a layout of blocks of channels wherever it can (NCHWc). Whether a residual sum is fused, and where a tensor has to be
reordered, depends on that layout, so one pass in graph order follows it. A reorder is charged to the kernel that needs
it: the first plain reader of a blocked tensor, the first blocked reader of a plain one. A kernel's ``io`` attribute
says so: a letter per input, 'b' when it finds the tensor blocked and 'p' when plain, and one for the output, e.g.
"bp>p"; it is left out where everything is blocked.

The rules below were read off the graphs onnxruntime writes with ``optimized_model_filepath``, and the tests compare
with those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from edgeprune.device.target import Fusion
from edgeprune.latency.kernel import Kernel, Shape, Site
from edgeprune.latency.onnxgraph import OnnxGraph
from edgeprune.latency.signature import GLOBAL_POOLS, POOLS, signature

CHANNEL_ALIGNMENT = 4  # a blocked convolution needs its input channels to be a multiple of this


@dataclass(slots=True)
class _Open:
    """A kernel under construction."""

    op: str
    attrs: dict[str, str]
    inputs: list[str]
    letters: list[str]
    nodes: list[str]
    name: str
    anchor_output: str
    output: str
    blocked: bool
    tail: list[str] = field(default_factory=list)


def sites(model: onnx.ModelProto, fusion: Fusion | None = None) -> list[Site]:
    """The kernels of a network with static shapes, in graph order. Every node is covered exactly once, except those
    computed from constants alone, which the runtime folds away.

    Raises UnsupportedModelError when a tensor has no static shape.
    """
    return _Walk(OnnxGraph(model), fusion or Fusion()).run()


class _Walk:
    def __init__(self, graph: OnnxGraph, fusion: Fusion):
        self.graph = graph
        self.fusion = fusion
        self.open: list[_Open] = []
        self.maker: dict[str, _Open] = {}  # tensor -> the kernel that ends with it
        self.blocked: set[str] = set()  # tensors in the blocked layout
        self.plain_copy: set[str] = set()  # blocked tensors that were reordered to plain already
        self.blocked_copy: set[str] = set()  # plain tensors that were reordered to blocked already
        self.covered: set[int] = set()

    def run(self) -> list[Site]:
        for index, node in enumerate(self.graph.nodes):
            if index not in self.covered:
                self.visit(index, node)
        return [self.close(kernel) for kernel in self.open]

    def visit(self, index: int, node: onnx.NodeProto) -> None:
        data = [name for name in node.input if name and not self.graph.is_const(name)]
        if self.fold_constant(node, data) or self.fuse_residual(node, data) or self.fuse_activation(node, data):
            return
        if self.fold_padding(node, data) or self.swish(index, node, data) or self.gelu(index, node, data):
            return
        self.add(node, [node], data, self.runs_blocked(node, data))

    def add(self, anchor: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], data: list[str], blocked: bool) -> _Open:
        """Open a kernel for ``nodes``, ``data`` being the tensors it reads."""
        output = nodes[-1].output[0]
        op, attrs = self.describe(anchor)
        reads_blocked = blocked and not self.reads_plain_input(anchor)
        letters = [self.read(name, reads_blocked) for name in data]
        kernel = _Open(
            op, attrs, data, letters, [n.name for n in nodes], anchor.name, anchor.output[0], output, blocked
        )
        kernel.tail = [n.op_type for n in nodes[1:]]
        self.open.append(kernel)
        for name in nodes[-1].output:
            self.maker[name] = kernel
        if blocked:
            self.blocked.add(output)
        return kernel

    def describe(self, node: onnx.NodeProto) -> tuple[str, dict[str, str]]:
        shapes = [self.graph.shape(name) if name else () for name in node.input]
        consts = {i: self.graph.const(name) for i, name in enumerate(node.input) if name and self.graph.is_const(name)}
        return signature(node, shapes, self.graph.shape(node.output[0]), consts)

    def read(self, tensor: str, blocked: bool) -> str:
        """The layout in which a reader finds a tensor; reordering it leaves a copy that later readers share."""
        copies = self.blocked_copy if blocked else self.plain_copy
        if (tensor in self.blocked) == blocked:
            return "b" if blocked else "p"
        if tensor in copies:
            return "b" if blocked else "p"
        copies.add(tensor)
        return "p" if blocked else "b"

    # where the blocked layout is used

    def runs_blocked(self, node: onnx.NodeProto, data: list[str]) -> bool:
        block = self.fusion.block
        if not block or not data or len(self.graph.shape(data[0])) != 4:
            return False
        channels = self.graph.shape(data[0])[1]
        if node.op_type == "Conv":
            return self.conv_runs_blocked(node)
        if node.op_type in POOLS:
            return channels % block == 0 and node.op_type != "LpPool" and len(node.output) == 1
        if any(name not in self.blocked for name in data):
            return False
        if node.op_type == "Concat":
            aligned = all(self.graph.shape(name)[1] % block == 0 for name in data)
            return aligned and self.graph.attribute(node, "axis") == 1
        if node.op_type in GLOBAL_POOLS:
            return channels % block == 0
        if node.op_type in ("Resize", "Upsample"):
            out, size = self.graph.shape(node.output[0]), self.graph.shape(data[0])
            whole = out[:2] == size[:2] and all(o % s == 0 for o, s in zip(out[2:], size[2:], strict=True))
            return whole and channels % block == 0
        if node.op_type == "BatchNormalization":
            return channels % block == 0
        if node.op_type in self.fusion.blocked:
            if len(data) != len(node.input) and node.op_type != "Clip":  # a constant operand
                return node.op_type == "Mul" and self.graph.is_per_channel(node) and channels % block == 0
            return len({self.graph.shape(name) for name in data}) == 1
        return False

    def conv_runs_blocked(self, node: onnx.NodeProto) -> bool:
        block = self.fusion.block
        if not self.graph.is_const(node.input[1]):
            return False
        out_channels, in_channels, *_ = self.graph.shape(node.input[1])
        group = int(self.graph.attribute(node, "group", 1))
        if group == 1:
            return in_channels < block or in_channels % CHANNEL_ALIGNMENT == 0
        if in_channels == 1 and out_channels == group:
            return out_channels % CHANNEL_ALIGNMENT == 0
        return in_channels % block == 0 and (out_channels // group) % block == 0

    def reads_plain_input(self, node: onnx.NodeProto) -> bool:
        """A convolution of few channels reads the plain layout and writes the blocked one."""
        group = int(self.graph.attribute(node, "group", 1)) if node.op_type == "Conv" else 0
        return group == 1 and self.graph.shape(node.input[1])[1] < self.fusion.block

    # what is fused into the kernel before it

    def fold_constant(self, node: onnx.NodeProto, data: list[str]) -> bool:
        """A constant factor, sum or batch norm behind a convolution goes into its weights."""
        if node.op_type not in ("Add", "Mul", "BatchNormalization") or len(data) != 1:
            return False
        kernel = self.maker.get(data[0])
        if kernel is None or self.graph.uses(data[0]) != 1 or kernel.tail:
            return False
        if kernel.op == "MatMul" and node.op_type == "Add" and len(self.graph.shape(data[0])) == 2:
            kernel.op, kernel.attrs = "Gemm", {"c1": "."}
        elif kernel.op != "Conv" or not (node.op_type == "BatchNormalization" or self.graph.is_per_channel(node)):
            return False
        self.extend(kernel, node, None)
        return True

    def fuse_residual(self, node: onnx.NodeProto, data: list[str]) -> bool:
        if node.op_type not in ("Add", "Sum") or len(data) != 2 or len(node.input) != 2:
            return False
        if self.graph.shape(data[0]) != self.graph.shape(data[1]):
            return False
        for position in (0, 1):
            kernel, other = self.maker.get(data[position]), data[1 - position]
            if kernel is None or kernel.op != "Conv" or kernel.tail or self.graph.uses(data[position]) != 1:
                continue
            if kernel.blocked:
                if other not in self.blocked:
                    continue
            elif self.fusion.block and all(name in self.blocked for name in data):
                continue
            kernel.letters.append(self.read(other, kernel.blocked))
            kernel.inputs.append(other)
            self.extend(kernel, node, "Add")
            return True
        return False

    def fuse_activation(self, node: onnx.NodeProto, data: list[str]) -> bool:
        if len(data) != 1:
            return False
        kernel = self.maker.get(data[0])
        if kernel is None or self.graph.uses(data[0]) != 1 or (kernel.tail and kernel.tail != ["Add"]):
            return False
        if kernel.op == "Conv":
            fits = node.op_type in self.fusion.conv_tail
        else:
            fits = kernel.op == "Gemm" and node.op_type in self.fusion.gemm_tail
        if fits:
            self.extend(kernel, node, node.op_type)
        return fits

    def extend(self, kernel: _Open, node: onnx.NodeProto, tail: str | None) -> None:
        kernel.nodes.append(node.name)
        if tail:
            kernel.tail.append(tail)
        kernel.output = node.output[0]
        self.maker[node.output[0]] = kernel
        if kernel.blocked:
            self.blocked.add(node.output[0])

    # patterns of several nodes that become one

    def fold_padding(self, node: onnx.NodeProto, data: list[str]) -> bool:
        """Pad of height and width with zeros, read by one convolution, becomes that convolution's own padding."""
        if node.op_type != "Pad" or len(data) != 1 or self.graph.uses(node.output[0]) != 1:
            return False
        readers = self.graph.readers(node.output[0])
        size, out = self.graph.shape(data[0]), self.graph.shape(node.output[0])
        if len(size) != 4 or size[:2] != out[:2] or not readers or readers[0].op_type != "Conv":
            return False
        amounts = self.graph.const(node.input[1]).tolist() if len(node.input) > 1 else []
        value = self.graph.const(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        mode = self.graph.attribute(node, "mode", b"constant")
        if len(amounts) != 8 or min(amounts) < 0 or float(value.ravel()[0]) != 0 or mode != b"constant":
            return False
        conv = readers[0]
        kernel = self.add(conv, [conv], data, self.conv_runs_blocked(conv) and bool(self.fusion.block))
        own = [int(v) for v in kernel.attrs["pads"].split("x")]
        kernel.attrs["pads"] = "x".join(str(o + p) for o, p in zip(own, amounts[2:4] + amounts[6:8], strict=True))
        kernel.nodes.append(node.name)
        self.covered.add(self.graph.index(conv))
        return True

    def swish(self, index: int, node: onnx.NodeProto, data: list[str]) -> bool:
        """x * sigmoid(x) is one element-wise kernel, written Sigmoid + Mul."""
        if node.op_type != "Sigmoid" or self.graph.uses(node.output[0]) != 1:
            return False
        reader = self.graph.readers(node.output[0])[0]
        if reader.op_type != "Mul" or set(reader.input) != {data[0], node.output[0]}:
            return False
        self.add(node, [node, reader], data, data[0] in self.blocked)
        self.covered.add(self.graph.index(reader))
        return True

    def gelu(self, index: int, node: onnx.NodeProto, data: list[str]) -> bool:
        """0.5 * x * (1 + erf(x / sqrt 2)), in the order of factors the exporters write, is one kernel named Erf."""
        chain = [node]
        for op in ("Erf", "Add", "Mul", "Mul"):
            if chain[0].op_type not in ("Div", "Mul") or self.graph.uses(chain[-1].output[0]) != 1:
                return False
            reader = self.graph.readers(chain[-1].output[0])[0]
            if reader.op_type != op:
                return False
            chain.append(reader)
        inputs = {name for part in chain for name in part.input if not self.graph.is_const(name)}
        if inputs - {part.output[0] for part in chain} != set(data) or len(data) != 1:
            return False
        kernel = self.add(chain[1], [chain[1], *chain[2:]], data, data[0] in self.blocked)
        kernel.nodes.insert(1, node.name)
        kernel.attrs, kernel.tail = {}, ["Gelu"]
        self.covered.update(self.graph.index(part) for part in chain)
        return True

    def close(self, kernel: _Open) -> Site:
        shown_plain = not kernel.blocked or (
            kernel.output in self.graph.outputs and kernel.output not in self.plain_copy
        )
        io = "".join(kernel.letters) + ">" + ("p" if shown_plain else "b")
        if self.fusion.block and set(io) - {"b", ">"}:
            kernel.attrs["io"] = io
        nodes = [twin for name in kernel.nodes for twin in (name, *self.graph.twins.get(name, ()))]
        inputs: tuple[Shape, ...] = tuple(self.graph.shape(name) for name in kernel.inputs)
        return Site(
            Kernel(
                kernel.op, tuple(sorted(kernel.attrs.items())), inputs, self.graph.shape(kernel.output),
                tuple(kernel.tail),
            ),
            kernel.name, tuple(nodes), tuple(kernel.inputs), kernel.output, kernel.anchor_output,
        )  # fmt: skip
