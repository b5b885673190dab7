"""What every operator does to channels, in one table. Read this file first.

Channels are followed through a network by the *kind* of each operator:

    ELEMENTWISE  tensors meet element by element: channels that meet belong together
    CHANNELWISE  each channel is worked on alone or with a parameter of its own; per-operator rules (norms, prelu, ...)
    POOLING      works on the trailing spatial dims of each channel
    REDUCTION    takes dims away (mean, sum, amax, ...)
    ALONG        needs all elements of one dim (softmax, sort, ...) but keeps the shape
    STRUCTURAL   moves elements without looking at them: executed as it is on integer labels
    FACTORY      a new tensor filled with one constant
    MIXING       every output channel depends on all input channels and the weights are not a module's: nothing is cut
    SIZE         numbers, not tensors

An operator that is in no row is *unknown*: what it touches stays whole, and it is reported by name.
"""

from __future__ import annotations

import math
import operator
from enum import Enum, auto
from typing import Any

import torch
from torch import fx


class Kind(Enum):
    ELEMENTWISE = auto()
    CHANNELWISE = auto()
    POOLING = auto()
    REDUCTION = auto()
    ALONG = auto()
    STRUCTURAL = auto()
    FACTORY = auto()
    MIXING = auto()
    SIZE = auto()


# ATen operators by the name of their packet ("add" covers add.Tensor and add.Scalar).
TABLE: dict[Kind, str] = {
    Kind.ELEMENTWISE: """
        add sub rsub mul div true_divide floor_divide remainder fmod pow maximum minimum fmax fmin where addcmul addcdiv
        lerp atan2 hypot copysign max_other min_other
        eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_not isnan isinf
        relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish sigmoid tanh hardsigmoid hardswish hardshrink
        softshrink threshold softplus log_sigmoid logit clamp clamp_min clamp_max clip
        abs neg sign sgn exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal sin cos tan asin acos atan
        sinh cosh asinh acosh atanh erf erfc floor ceil round trunc frac positive nan_to_num masked_fill
        clone contiguous to _to_copy type_as dropout feature_dropout alpha_dropout
        zeros_like ones_like full_like empty_like rand_like randn_like expand_as copy
        """,
    Kind.CHANNELWISE: """
        prelu glu layer_norm rms_norm group_norm batch_norm instance_norm
        """,
    Kind.POOLING: """
        max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa
        """,
    Kind.REDUCTION: """
        mean sum amax amin prod var std var_mean std_mean linalg_vector_norm norm logsumexp max min any all
        """,
    Kind.ALONG: """
        softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp sort argsort
        """,
    Kind.STRUCTURAL: """
        cat concat stack view reshape view_as reshape_as _unsafe_view flatten unflatten permute transpose t numpy_T
        movedim swapaxes swapdims
        squeeze unsqueeze expand repeat repeat_interleave split split_with_sizes chunk unbind slice select narrow pad
        constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
        pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle roll flip index_select
        """,
    Kind.FACTORY: """
        zeros ones full empty new_zeros new_ones new_full new_empty
        """,
    Kind.MIXING: """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear matmul mm bmm baddbmm
        addmm einsum scaled_dot_product_attention
        """,
    Kind.SIZE: """
        sym_size sym_numel sym_stride
        """,
}

_KINDS = {name: kind for kind, names in TABLE.items() for name in names.split()}

_SIZE_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg,
    operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_,
    operator.or_, math.ceil, math.floor, math.trunc, round, min, max, int, float,
    torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite, torch.sym_sqrt,
}  # fmt: skip

SPATIAL_DIMS = {name: int(digit) for name in _KINDS for digit in "123" if f"{digit}d" in name}


def name_of(target: Any) -> str:
    """The name an operator is known by: "add" for aten.add.Tensor, "mylib.nms" for an operator of another library."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return str(getattr(target, "__name__", target))
    name = str(packet.__name__)
    library = str(getattr(target, "namespace", "aten"))
    return name if library == "aten" else f"{library}.{name}"


def kind_of(target: Any) -> Kind | None:
    """The kind of a ``call_function`` target, None for an operator that is in no row of the table."""
    if target in _SIZE_FUNCTIONS:
        return Kind.SIZE
    name = name_of(target)
    if name in ("max", "min") and "other" in str(target):
        return Kind.ELEMENTWISE
    return _KINDS.get(name)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults filled in; empty for a Python function."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace one argument of an ATen call by its name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
