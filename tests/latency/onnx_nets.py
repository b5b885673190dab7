"""Small hand-built ONNX networks, and the graph onnxruntime makes of them: the truth fusion.py is compared with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import Site


def blocked_runtime() -> bool:
    """Whether this machine's onnxruntime uses blocks of 16 channels, which the expectations are written for."""
    try:
        with open("/proc/cpuinfo") as file:
            return "avx512f" in file.read()
    except OSError:
        return False


needs_blocks = pytest.mark.skipif(not blocked_runtime(), reason="expectations are those of AVX-512")


class Builder:
    def __init__(self, seed: int = 0):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def constant(self, values: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant((self.random.standard_normal(shape) * 0.1).astype(np.float32))

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        names = [f"{kind.lower()}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"N{len(self.nodes)}", **attrs))
        return names[0] if outputs == 1 else names

    def conv(self, x: str, c_in: int, c_out: int, k: int = 3, stride: int = 1, group: int = 1) -> str:
        weights = self.weight(c_out, c_in // group, k, k), self.weight(c_out)
        return self.op("Conv", x, *weights, kernel_shape=[k, k], strides=[stride] * 2, pads=[k // 2] * 4, group=group)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def relu6(self, x: str) -> str:
        return self.op("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def pooled(self, x: str, channels: int, classes: int = 10) -> str:
        flat = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.op("Gemm", flat, self.weight(classes, channels), self.weight(classes), transB=1)

    def model(self, output: str, size: int = 16, channels: int = 3) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, size, size])
        y = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "net", [x], [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def resnet(c: int = 16, shortcut: str = "projection", inner: int | None = None, size: int = 16) -> onnx.ModelProto:
    """Two stages of basic blocks; ``shortcut`` "projection" or "padding" (strided slice, then zero channels)."""
    b = Builder()
    inner = inner or c
    x, width = b.relu(b.conv("x", 3, c)), c
    for out, stride in ((c, 1), (2 * c, 2), (2 * c, 1)):
        y = b.conv(b.relu(b.conv(x, width, inner, 3, stride)), inner, out)
        short = x
        if stride == 2 and shortcut == "projection":
            short = b.conv(x, width, out, 1, stride)
        elif stride == 2:
            bounds = (np.array(v, np.int64) for v in ([0, 0], [size, size], [2, 3], [2, 2]))
            short = b.op("Slice", x, *(b.constant(v) for v in bounds))
            half = (out - width) // 2
            short = b.op("Pad", short, b.constant(np.array([0, half, 0, 0, 0, out - width - half, 0, 0], np.int64)))
        x, width = b.relu(b.op("Add", y, short)), out
    return b.model(b.pooled(x, width), size)


def bottleneck(c: int = 16) -> onnx.ModelProto:
    b = Builder()
    x = b.relu(b.conv("x", 3, c, 7, 2))
    x = b.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = b.conv(b.relu(b.conv(b.relu(b.conv(x, c, c, 1)), c, c)), c, 4 * c, 1)
    x = b.relu(b.op("Add", y, b.conv(x, c, 4 * c, 1)))
    y = b.conv(b.relu(b.conv(b.relu(b.conv(x, 4 * c, c, 1)), c, c)), c, 4 * c, 1)
    return b.model(b.pooled(b.relu(b.op("Add", y, x)), 4 * c), 32)


def inverted_residual(c: int = 24) -> onnx.ModelProto:
    b = Builder()
    x = b.conv(b.relu6(b.conv("x", 3, 32, 3, 2)), 32, c, 1)
    for _ in range(2):
        y = b.relu6(b.conv(x, c, 6 * c, 1))
        y = b.relu6(b.conv(y, 6 * c, 6 * c, 3, 1, 6 * c))
        x = b.op("Add", x, b.conv(y, 6 * c, c, 1))
    return b.model(b.pooled(b.relu6(b.conv(x, c, 64, 1)), 64))


def squeeze_excite(c: int = 32, activation: str = "Relu") -> onnx.ModelProto:
    b = Builder()
    x = b.op(activation, b.conv("x", 3, c))
    s = b.op("GlobalAveragePool", x)
    s = b.op("Sigmoid", b.conv(b.relu(b.conv(s, c, 8, 1)), 8, c, 1))
    x = b.conv(b.op("Mul", x, s), c, c)
    x = b.op("Mul", x, b.op("Sigmoid", x))
    return b.model(b.pooled(b.op("HardSwish", b.conv(x, c, c)), c))


def dense(c: int = 32, growth: int = 16) -> onnx.ModelProto:
    b = Builder()
    x, width = b.relu(b.conv("x", 3, c)), c
    for _ in range(2):
        y = b.relu(b.conv(b.relu(b.conv(x, width, 4 * growth, 1)), 4 * growth, growth))
        x, width = b.op("Concat", x, y, axis=1), width + growth
    x = b.op("AveragePool", b.relu(b.conv(x, width, c, 1)), kernel_shape=[2, 2], strides=[2, 2])
    left, right = b.op("Split", x, outputs=2, axis=1)
    x = b.op("Concat", b.conv(left, c // 2, c // 2, 3, 1, 2), right, axis=1)
    up = b.op("Resize", x, "", b.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    padded = b.op("Pad", up, b.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)))
    weights = b.weight(c, c, 3, 3), b.weight(c)
    x = b.op("PRelu", b.op("Conv", padded, *weights, kernel_shape=[3, 3]), b.weight(c, 1, 1))
    return b.model(b.pooled(b.op("Elu", x), c))


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The graph as onnxruntime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def real_kernels(graph: onnx.GraphProto) -> Counter[str]:
    """Node kinds of an optimised graph; convolutions with their layout and what is fused into them."""
    kinds: Counter[str] = Counter()
    for node in graph.node:
        kind = node.op_type.removeprefix("Fused")
        activation = [a.s.decode() for a in node.attribute if a.name == "activation"]
        if kind == "Conv":
            layout = "blocked" if "nchwc" in node.domain else "plain"
            kind = "+".join([f"Conv {layout}", *(["Add"] if len(node.input) > 3 else []), *activation])
        elif kind == "Gemm":
            kind = "+".join(["Gemm", *activation])
        kinds[{"QuickGelu": "Sigmoid+Mul", "Upsample": "Resize", "Flatten": "Reshape"}.get(kind, kind)] += 1
    return kinds


def told_kernels(found: list[Site], outputs: set[str], block: int = 16) -> Counter[str]:
    """The same counts from the sites, reorders included."""
    kinds: Counter[str] = Counter()
    for site in found:
        kernel = site.kernel
        letters, _, out = kernel.attr("io", "b" * len(kernel.inputs) + ">b").partition(">")
        blocked = out == "b" or (kernel.op == "Conv" and site.output in outputs)
        direct = kernel.op == "Conv" and kernel.attr("group") == "1" and kernel.inputs[0][1] < block
        if kernel.op == "Conv":
            kinds["+".join([f"Conv {'blocked' if blocked else 'plain'}", *kernel.tail])] += 1
        elif kernel.op == "HardSwish":  # the runtime runs it as two nodes
            kinds["HardSigmoid"] += 1
            kinds["Mul"] += 1
        else:
            kinds["+".join([kernel.op, *kernel.tail])] += 1
        for position, letter in enumerate(letters):
            if blocked and not (direct and position == 0):
                kinds["ReorderInput"] += letter == "p"
            else:
                kinds["ReorderOutput"] += letter == "b"
    return +kinds


def compare(model: onnx.ModelProto, folder: Path) -> None:
    outputs = {value.name for value in model.graph.output}
    told, real = told_kernels(sites(model), outputs), real_kernels(optimised(model, folder).graph)
    assert told == real, f"told but not run {told - real}, run but not told {real - told}"
