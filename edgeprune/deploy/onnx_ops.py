"""Which ONNX nodes an ATen operator becomes: ``TABLE[overload] = row``. A new operator is one line here.

Overloads are named as text, so that one which this torch does not have is simply left out.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from edgeprune.deploy.rows import elementwise as e
from edgeprune.deploy.rows import matrix as m
from edgeprune.deploy.rows import pooling as p
from edgeprune.deploy.rows import reduction as r
from edgeprune.deploy.rows import structure as s

_ROWS: dict[str, Any] = {
    # convolution and matrix products
    "conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding": m.conv,
    "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input": m.conv_transpose,
    "convolution.default": m.convolution,
    "linear.default": m.linear,
    "matmul.default mm.default bmm.default": m.matmul,
    "addmm.default": m.addmm,
    "baddbmm.default": m.baddbmm,
    "einsum.default": m.einsum,
    "scaled_dot_product_attention.default": m.attention,
    "batch_norm.default": m.folded_batch_norm,
    # arithmetic
    "add.Tensor add.Scalar": m.add,
    "sub.Tensor sub.Scalar": e.binary("Sub"),
    "mul.Tensor mul.Scalar": e.binary("Mul"),
    "rsub.Scalar rsub.Tensor": e.rsub,
    "div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode": e.div,
    "floor_divide.default": e.floor_divide,
    "remainder.Tensor remainder.Scalar": e.remainder,
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar": e.power,
    "square.default": e.square,
    "maximum.default": e.binary("Max"),
    "minimum.default": e.binary("Min"),
    "max.other": e.binary("Max"),
    "min.other": e.binary("Min"),
    "addcmul.default": e.addcmul,
    "lerp.Scalar lerp.Tensor": e.lerp,
    "neg.default": e.unary("Neg"),
    "abs.default": e.unary("Abs"),
    "sign.default": e.unary("Sign"),
    "exp.default": e.unary("Exp"),
    "expm1.default": e.expm1,
    "log.default": e.unary("Log"),
    "log1p.default": e.log1p,
    "sqrt.default": e.unary("Sqrt"),
    "rsqrt.default": e.rsqrt,
    "reciprocal.default": e.unary("Reciprocal"),
    "erf.default": e.unary("Erf"),
    "sin.default": e.unary("Sin"),
    "cos.default": e.unary("Cos"),
    "atan.default": e.unary("Atan"),
    "floor.default": e.unary("Floor"),
    "ceil.default": e.unary("Ceil"),
    "round.default": e.unary("Round"),
    # activations
    "relu.default": e.relu,
    "relu6.default": e.clip(0.0, 6.0),
    "hardtanh.default": e.clip("min_val", "max_val"),
    "clamp.default clamp.Tensor": e.clip("min", "max"),
    "clamp_min.default clamp_min.Tensor": e.clip("min", None),
    "clamp_max.default clamp_max.Tensor": e.clip(None, "max"),
    "leaky_relu.default": e.leaky_relu,
    "rrelu.default": e.rrelu,
    "prelu.default": e.prelu,
    "elu.default": e.elu,
    "celu.default": e.celu,
    "selu.default": e.unary("Selu"),
    "sigmoid.default": e.unary("Sigmoid"),
    "tanh.default": e.unary("Tanh"),
    "silu.default": e.silu,
    "mish.default": e.mish,
    "hardswish.default": e.unary("HardSwish"),
    "hardsigmoid.default": e.hardsigmoid,
    "softplus.default": e.softplus,
    "log_sigmoid.default": e.log_sigmoid,
    "gelu.default": e.gelu,
    "glu.default": e.glu,
    "threshold.default": e.threshold,
    # comparison and choice
    "eq.Scalar eq.Tensor": e.compare("Equal"),
    "ne.Scalar ne.Tensor": e.compare("Equal", negate=True),
    "gt.Scalar gt.Tensor": e.compare("Greater"),
    "ge.Scalar ge.Tensor": e.compare("GreaterOrEqual"),
    "lt.Scalar lt.Tensor": e.compare("Less"),
    "le.Scalar le.Tensor": e.compare("LessOrEqual"),
    "logical_and.default bitwise_and.Tensor __and__.Tensor": e.logical("And"),
    "logical_or.default bitwise_or.Tensor __or__.Tensor": e.logical("Or"),
    "logical_not.default bitwise_not.default": e.logical_not,
    "where.self where.ScalarOther where.ScalarSelf where.Scalar": e.where,
    "masked_fill.Scalar masked_fill.Tensor": e.masked_fill,
    # nothing to do, casts, constants of a tensor's shape
    "contiguous.default clone.default detach.default alias.default lift_fresh_copy.default": e.nothing,
    "dropout.default feature_dropout.default alpha_dropout.default feature_alpha_dropout.default": e.dropout,
    "to.dtype to.device to.dtype_layout to.other _to_copy.default type_as.default": e.cast,
    "zeros_like.default new_zeros.default": e.filled(0),
    "ones_like.default new_ones.default": e.filled(1),
    "full_like.default new_full.default": e.filled("fill_value"),
    # reductions, softmax, normalisation
    "mean.dim mean.default": r.reduce("ReduceMean", "GlobalAveragePool"),
    "sum.dim_IntList sum.default": r.reduce("ReduceSum"),
    "amax.default max.default": r.reduce("ReduceMax", "GlobalMaxPool"),
    "amin.default min.default": r.reduce("ReduceMin"),
    "prod.dim_int prod.default": r.reduce("ReduceProd"),
    "logsumexp.default": r.reduce("ReduceLogSumExp"),
    "max.dim": r.extreme("ReduceMax", "ArgMax"),
    "min.dim": r.extreme("ReduceMin", "ArgMin"),
    "argmax.default": r.position("ArgMax"),
    "argmin.default": r.position("ArgMin"),
    "linalg_vector_norm.default norm.ScalarOpt_dim": r.vector_norm,
    "var.correction var.dim": r.var,
    "std.correction std.dim": r.std,
    "var_mean.correction": r.var_mean,
    "cumsum.default": r.cumsum,
    "topk.default": r.topk,
    "softmax.int _softmax.default": r.softmax("Softmax"),
    "log_softmax.int _log_softmax.default": r.softmax("LogSoftmax"),
    "layer_norm.default": r.layer_norm,
    "rms_norm.default": r.rms_norm,
    "group_norm.default": r.group_norm,
    "instance_norm.default": r.instance_norm,
    # pooling
    "max_pool1d.default max_pool2d.default max_pool3d.default": p.max_pool,
    "max_pool2d_with_indices.default max_pool1d_with_indices.default": p.max_pool,
    "avg_pool1d.default avg_pool2d.default avg_pool3d.default": p.avg_pool,
    "adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default": p.adaptive_avg_pool,
    "adaptive_max_pool1d.default adaptive_max_pool2d.default": p.adaptive_max_pool,
    # structure
    "view.default reshape.default flatten.using_ints unflatten.int _unsafe_view.default view_as.default": s.reshape,
    "squeeze.default squeeze.dim squeeze.dims unsqueeze.default reshape_as.default": s.reshape,
    "permute.default": s.permute,
    "transpose.int swapaxes.default": s.transpose,
    "t.default numpy_T.default": s.t,
    "movedim.int movedim.intlist": s.movedim,
    "expand.default expand_as.default broadcast_to.default": s.expand,
    "repeat.default tile.default": s.repeat,
    "cat.default concat.default": s.cat,
    "stack.default": s.stack,
    "chunk.default split.Tensor split_with_sizes.default split.sizes tensor_split.sections": s.split,
    "unbind.int": s.unbind,
    "select.int": s.select,
    "index_select.default": s.index_select,
    "index.Tensor": s.index,
    "gather.default": s.gather,
    "embedding.default": s.embedding,
    "flip.default": s.flip,
    "roll.default": s.roll,
    "pad.default": s.pad(),
    "constant_pad_nd.default": s.pad("constant"),
    "reflection_pad1d.default reflection_pad2d.default": s.pad("reflect"),
    "replication_pad1d.default replication_pad2d.default": s.pad("replicate"),
    "pixel_shuffle.default": s.pixel_shuffle,
    "pixel_unshuffle.default": s.pixel_unshuffle,
    "channel_shuffle.default native_channel_shuffle.default": s.channel_shuffle,
    "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec": s.resize("nearest"),
    "upsample_nearest1d.default upsample_nearest2d.default upsample_nearest3d.default": s.resize("nearest"),
    "_upsample_nearest_exact2d.vec _upsample_nearest_exact2d.default": s.resize("nearest_exact"),
    "upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec": s.resize("linear"),
    "upsample_linear1d.default upsample_bilinear2d.default upsample_trilinear3d.default": s.resize("linear"),
    "upsample_bicubic2d.vec upsample_bicubic2d.default": s.resize("cubic"),
    "grid_sampler.default": s.grid_sample,
}


def _overload(name: str) -> Any:
    try:
        return operator.attrgetter(name)(torch.ops.aten)
    except AttributeError:
        return None


TABLE: dict[Any, Any] = {
    overload: row for names, row in _ROWS.items() for name in names.split() if (overload := _overload(name)) is not None
}
