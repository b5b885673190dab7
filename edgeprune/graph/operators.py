"""The operators that a model file may name: pure tensor arithmetic, and nothing that reaches outside the process.

ATen also holds operators that write files (``save``, ``from_file``), read raw memory or change global state, and
``getattr`` chains from ``torch`` reach ``torch.hub`` and ``os``. So a file's operators are looked up here by name, and
only these exist for it. The in-place form of an operator (``relu_``) stands or falls with its plain form.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from edgeprune.errors import ModelFileError, UnsupportedModelError

_PART = re.compile(r"[\w +:/@#-]+")

_ALLOWED_TEXT = """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid sigmoid tanh softplus softmax
    log_softmax _softmax _log_softmax prelu _prelu_kernel rrelu threshold glu log_sigmoid hardshrink softshrink add
    sub rsub mul div subtract multiply divide true_divide floor_divide remainder fmod neg negative abs absolute sign
    sgn pow float_power square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan atan2 sinh
    cosh erf erfc erfinv reciprocal floor ceil round trunc frac clamp clamp_min clamp_max clip minimum maximum fmin
    fmax max min where eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    bitwise_not bitwise_xor __and__ __or__ isnan isinf isfinite nan_to_num lerp addcmul addcdiv masked_fill cumsum
    cumprod logit sinc hypot heaviside copysign logaddexp greater greater_equal less less_equal not_equal mean sum
    prod amax amin argmax argmin var std var_mean std_mean norm linalg_vector_norm linalg_norm frobenius_norm
    logsumexp any all topk sort argsort median count_nonzero nansum nanmean batch_norm
    _native_batch_norm_legit_no_training _native_batch_norm_legit native_batch_norm layer_norm native_layer_norm
    group_norm native_group_norm instance_norm rms_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d convolution _convolution linear matmul mm bmm addmm baddbmm addmv mv dot einsum bilinear outer
    scaled_dot_product_attention embedding cosine_similarity max_pool1d max_pool2d max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d max_unpool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator pixel_shuffle pixel_unshuffle channel_shuffle
    im2col col2im view reshape flatten unflatten squeeze unsqueeze permute transpose t numpy_T mT adjoint movedim
    moveaxis swapaxes swapdims expand expand_as view_as reshape_as repeat repeat_interleave tile cat concat
    concatenate stack hstack vstack split split_with_sizes chunk tensor_split unsafe_split unsafe_split_with_sizes
    unsafe_chunk unbind slice select narrow index index_select gather scatter scatter_add index_put slice_scatter
    select_scatter index_add flip roll rot90 pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d contiguous clone alias detach lift_fresh_copy lift_fresh
    to _to_copy type_as _unsafe_view unfold diagonal tril triu meshgrid broadcast_to broadcast_tensors ravel
    view_copy _reshape_alias _shape_as_tensor zeros ones full zeros_like ones_like full_like new_zeros new_ones
    new_full arange linspace scalar_tensor eye fill zero copy dropout feature_dropout alpha_dropout
    feature_alpha_dropout native_dropout sym_size sym_numel sym_stride sym_storage_offset _assert_async
    _assert_scalar _assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size
"""
ALLOWED_ATEN = frozenset(_ALLOWED_TEXT.split())

# arithmetic on sizes, by the names that torch.export gives it
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            "eq", "ne", "le", "ge", "lt", "gt", "neg", "pos", "mul", "add", "sub", "floordiv", "mod", "truediv", "and_",
            "or_", "getitem",
        )
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_not", "sym_int", "sym_float", "sym_max", "sym_min", "sym_ite", "sym_sum")
        if hasattr(torch, name)
    },
    "math.trunc": math.trunc,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
}  # fmt: skip


def aten_packet(name: str, origin: str) -> Any:
    """``torch.ops.aten.<name>`` for an operator that a file may call; else UnsupportedModelError naming it."""
    packet = getattr(torch.ops.aten, name, None) if _allowed(name) else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise UnsupportedModelError(
            f"{origin}: operator {name[:80]!r} is not among the ATen operators that a model file may call; "
            "write the model without it and export it again"
        )
    return packet


def resolve(target: str, origin: str) -> Callable[..., Any]:
    """The function that an exported node's target names ("torch.ops.aten.relu.default", "_operator.mul").

    Raises UnsupportedModelError for every name that is not an allowed operator, custom operators included.
    """
    if target in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[target]
    parts = target.split(".")
    if len(parts) == 5 and parts[:3] == ["torch", "ops", "aten"]:
        overload = getattr(aten_packet(parts[3], origin), parts[4], None) if parts[4].isidentifier() else None
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise UnsupportedModelError(
        f"{origin}: operator {target[:120]!r} is not an ATen operator that a model file may call; "
        "write the model with plain torch operators and export it again"
    )


def checked_path(path: str, origin: str) -> str:
    """A dotted attribute path that is safe in generated code: ``fx`` writes the names of attributes into Python source
    that it compiles, quoted but not escaped."""
    if not path or len(path) > 1000 or not all(_PART.fullmatch(part) for part in path.split(".")):
        raise ModelFileError(f"{origin}: {path[:80]!r} is no name of a weight")
    return path


def checked_name(name: str, origin: str) -> str:
    """The name of an input; ``fx`` writes it into a function signature as it is."""
    if not name.isidentifier() or keyword.iskeyword(name) or len(name) > 1000:
        raise ModelFileError(f"{origin}: {name[:80]!r} is no name of an input")
    return name


def _allowed(name: str) -> bool:
    return name in ALLOWED_ATEN or (name.endswith("_") and not name.startswith("__") and name[:-1] in ALLOWED_ATEN)
