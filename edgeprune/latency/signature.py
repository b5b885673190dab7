"""One ONNX node -> the part of a kernel that it alone decides: operator, attributes, constant operands.

Attributes that only change values (epsilon, alpha, a clip's bounds) are left out; sizes that follow from the shapes
(slice bounds, pad amounts, target shapes) too, so that kernels which take equal time have equal keys.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import AttributeProto, numpy_helper

from edgeprune.errors import UnsupportedModelError
from edgeprune.latency.kernel import Shape, shape_text

CONVS = ("Conv", "ConvTranspose")
POOLS = ("MaxPool", "AveragePool", "LpPool")
GLOBAL_POOLS = ("GlobalAveragePool", "GlobalMaxPool")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")  # one kernel for the runtime: a copy, or nothing

_VALUES_ONLY = frozenset(
    (
        *("alpha", "beta", "gamma", "epsilon", "momentum", "value", "lambd", "bias", "min", "max", "allowzero"),
        *("training_mode", "seed", "extrapolation_value", "cubic_coeff_a", "exclude_outside", "spatial", "auto_pad"),
        *("num_outputs", "output_shape", "output_padding", "transB", "storage_order", "stash_type", "to"),
    )
)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type != AttributeProto.GRAPH}


def window(node: onnx.NodeProto, spatial: int, kernel_shape: list[int], size: Shape, out: Shape) -> dict[str, str]:
    """Attributes of a convolution or pooling with ``auto_pad`` resolved; ``size`` and ``out`` are spatial sizes."""
    given = attributes(node)
    strides = [int(v) for v in given.get("strides", [1] * spatial)]  # type: ignore[attr-defined]
    dilations = [int(v) for v in given.get("dilations", [1] * spatial)]  # type: ignore[attr-defined]
    pads = [int(v) for v in given.get("pads", [0] * 2 * spatial)]  # type: ignore[attr-defined]
    auto = given.get("auto_pad", b"NOTSET")
    if auto in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [
            max(0, (o - 1) * s + (k - 1) * d + 1 - n)
            for n, o, s, k, d in zip(size, out, strides, kernel_shape, dilations, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = small + large if auto == b"SAME_UPPER" else large + small
    return {
        "kernel_shape": shape_text(tuple(kernel_shape)),
        "strides": shape_text(tuple(strides)),
        "pads": shape_text(tuple(pads)),
        "dilations": shape_text(tuple(dilations)),
    }


def signature(
    node: onnx.NodeProto, inputs: list[Shape], output: Shape, consts: dict[int, np.ndarray]
) -> tuple[str, dict[str, str]]:
    """(operator, attributes as text). ``inputs``: shapes of *all* inputs (() for an absent one); ``consts``: those
    that are constants, by position. Raises UnsupportedModelError for an attribute that cannot be written down."""
    op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    given = attributes(node)
    if op in CONVS and 1 in consts:
        weight = inputs[1]
        spatial = len(weight) - 2
        attrs = window(node, spatial, list(weight[2:]), inputs[0][2:], output[2:])
        group = int(given.get("group", 1))  # type: ignore[call-overload]
        attrs["group"] = "dw" if group > 1 and group == inputs[0][1] else str(group)
        if op == "ConvTranspose" and any(given.get("output_padding", [])):  # type: ignore[arg-type, call-overload]
            attrs["output_padding"] = shape_text(tuple(given["output_padding"]))  # type: ignore[arg-type]
        return op, attrs
    if op in POOLS:
        kernel_shape = [int(v) for v in given["kernel_shape"]]  # type: ignore[attr-defined]
        attrs = window(node, len(kernel_shape), kernel_shape, inputs[0][2:], output[2:])
        attrs |= {k: str(given[k]) for k in ("ceil_mode", "count_include_pad") if given.get(k)}
        return op, attrs
    if op in RESHAPES:
        return "Reshape", {}
    attrs = {name: _text(op, name, value) for name, value in given.items() if name not in _VALUES_ONLY}
    if op == "Split":
        attrs["num_outputs"] = str(len(node.output))
    if op == "Cast":
        attrs["to"] = str(given["to"])
    for position, const in consts.items():
        attrs |= _constant(op, position, const, inputs, output, consts)
    return op, attrs


def _constant(
    op: str, position: int, const: np.ndarray, inputs: list[Shape], output: Shape, consts: dict[int, np.ndarray]
) -> dict[str, str]:
    if op == "Slice":
        if position != 4:
            return {}
        rank = len(inputs[0])
        axes = consts[3].tolist() if 3 in consts else range(const.size)
        steps = [1] * rank
        for axis, step in zip(axes, const.tolist(), strict=True):
            steps[axis] = int(step)
        return {"steps": ",".join(map(str, steps))} if any(s != 1 for s in steps) else {}
    if op in ("Pad", "Expand", "Resize", "Split", "Tile", "ConstantOfShape", "TopK"):
        return {}  # amounts follow from the shapes
    if op == "Clip":
        return {}
    if op.startswith("Reduce") and position == 1:
        return {"axes": ",".join(str(int(v)) for v in const.ravel())}
    if op in ("Gather", "GatherElements") and position == 1:
        return {"indices": shape_text(const.shape)}
    if np.issubdtype(const.dtype, np.floating):
        return {f"c{position}": shape_text(_broadcast_pattern(const.shape, output, op, inputs[0]))}
    return {f"c{position}": f"{const.dtype.name}:{shape_text(const.shape)}"}


def _broadcast_pattern(shape: Shape, output: Shape, op: str, first: Shape) -> Shape:
    """A constant operand's shape with 0 for "as the output": (64, 1, 1) beside (1, 64, 28, 28) -> (0, 1, 1)."""
    if op in ("MatMul", "Gemm"):
        return ()  # (K, N) follows from input and output
    if op in ("BatchNormalization", "InstanceNormalization", "GroupNormalization") and len(shape) == 1:
        return (-1,) if shape[0] == first[1] else shape  # written as "-1": per channel
    reference = output[len(output) - len(shape) :] if len(shape) <= len(output) else ()
    if len(reference) != len(shape):
        return shape
    return tuple(0 if r == s and s != 1 else s for s, r in zip(shape, reference, strict=True))


def _text(op: str, name: str, value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value):
        return ",".join(repr(v) for v in value)
    raise UnsupportedModelError(f"operator {op}: attribute {name} ({type(value).__name__}) cannot be priced")


def as_array(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor)
