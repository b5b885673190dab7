"""Every row of the operator table, run by onnxruntime, gives what torch gives."""

from __future__ import annotations

import math

import pytest
import torch
from exported import X, assert_clean, largest_error, network_of, overload

from edgeprune.deploy.export import to_onnx
from edgeprune.deploy.onnx_ops import TABLE

_generator = torch.Generator().manual_seed(0)


def w(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator)


def p(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=_generator) + 0.5


image = X((1, 4, 9, 8))
even = X((1, 4, 8, 6))
rows = X((1, 5, 6))
matrix = X((1, 6))
positive = X((1, 4, 5), "positive")
mask = X((1, 4, 5), "bool")
small = X((1, 4, 5))

CASES = {
    "conv1d": ("conv1d.default", [X((1, 4, 9)), w(6, 4, 3), w(6), [2], [1], [1], 1]),
    "conv2d": ("conv2d.default", [image, w(6, 4, 3, 3), w(6), [2, 1], [1, 0], [1, 2]]),
    "conv2d no bias, scalar arguments": ("conv2d.default", [image, w(6, 4, 1, 1), None, [1], [0]]),
    "conv2d depthwise": ("conv2d.default", [image, w(8, 1, 3, 3), w(8), [1, 1], [1, 1], [1, 1], 4]),
    "conv2d computed weight": ("conv2d.default", [X((1, 4, 9, 8)), X((1, 4, 3, 3))]),
    "conv3d": ("conv3d.default", [X((1, 2, 4, 5, 6)), w(3, 2, 3, 3, 3), w(3), [1, 1, 1], [1, 1, 1]]),
    "conv1d same": ("conv1d.padding", [X((1, 4, 9)), w(6, 4, 4), None, [1], "same"]),
    "conv2d same": ("conv2d.padding", [image, w(6, 4, 2, 3), w(6), [1, 1], "same", [1, 2]]),
    "conv2d valid": ("conv2d.padding", [image, w(6, 4, 3, 3), w(6), [2, 2], "valid"]),
    "conv3d same": ("conv3d.padding", [X((1, 2, 4, 5, 6)), w(3, 2, 3, 3, 3), None, [1, 1, 1], "same"]),
    "conv_transpose1d": ("conv_transpose1d.default", [X((1, 4, 9)), w(4, 3, 3), w(3), [2], [1], [1]]),
    "conv_transpose2d": ("conv_transpose2d.input", [image, w(4, 3, 3, 3), w(6), [2, 2], [1, 1], [1, 0], 2, [1, 1]]),
    "conv_transpose3d": ("conv_transpose3d.input", [X((1, 2, 4, 5, 6)), w(2, 3, 2, 2, 2), None, [2, 2, 2]]),
    "convolution": ("convolution.default", [image, w(6, 4, 3, 3), w(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 1]),
    "convolution transposed": (
        "convolution.default",
        [image, w(4, 6, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1],
    ),
    "linear": ("linear.default", [matrix, w(3, 6), w(3)]),
    "linear no bias": ("linear.default", [matrix, w(3, 6)]),
    "linear 3d": ("linear.default", [rows, w(3, 6), w(3)]),
    "linear 3d no bias": ("linear.default", [rows, w(3, 6)]),
    "linear computed weight": ("linear.default", [rows, X((1, 6))]),
    "matmul": ("matmul.default", [rows, X((1, 6, 4))]),
    "mm": ("mm.default", [matrix, w(6, 4)]),
    "bmm": ("bmm.default", [rows, X((1, 6, 4))]),
    "addmm": ("addmm.default", [w(4), matrix, w(6, 4)], {"beta": 0.5, "alpha": 2}),
    "baddbmm": ("baddbmm.default", [X((1, 5, 4)), rows, X((1, 6, 4))], {"beta": 0.5, "alpha": 2}),
    "einsum": ("einsum.default", ["bij,bjk->bik", [rows, X((1, 6, 4))]]),
    "attention": ("scaled_dot_product_attention.default", [X((1, 2, 5, 4)), X((1, 2, 6, 4)), X((1, 2, 6, 3))]),
    "attention causal": (
        "scaled_dot_product_attention.default",
        [X((1, 2, 5, 4)), X((1, 2, 5, 4)), X((1, 2, 5, 3)), None, 0.0, True],
        {"scale": 0.3},
    ),
    "attention mask": (
        "scaled_dot_product_attention.default",
        [X((1, 2, 5, 4)), X((1, 2, 6, 4)), X((1, 2, 6, 3)), torch.arange(30).reshape(5, 6) % 3 > 0],
    ),
    "attention computed mask": (
        "scaled_dot_product_attention.default",
        [X((1, 2, 5, 4)), X((1, 2, 1, 4)), X((1, 2, 1, 3)), X((1, 2, 5, 1))],
    ),
    "batch_norm": ("batch_norm.default", [image, p(4), w(4), w(4), p(4), False, 0.1, 1e-5, False]),
    "batch_norm no affine": ("batch_norm.default", [matrix, None, None, w(6), p(6), False, 0.1, 1e-3, False]),
    # arithmetic
    "add": ("add.Tensor", [small, X((1, 4, 5))]),
    "add broadcast": ("add.Tensor", [small, w(4, 1)]),
    "add alpha": ("add.Tensor", [small, X((1, 1, 5))], {"alpha": 0.5}),
    "add number alpha": ("add.Tensor", [small, 3], {"alpha": 2}),
    "add integer and float": ("add.Tensor", [X((1, 4, 5), "index", 7), small]),
    "add Scalar": ("add.Scalar", [small, 2]),
    "sub": ("sub.Tensor", [small, w(4, 5)]),
    "sub Scalar": ("sub.Scalar", [small, 2.5]),
    "mul": ("mul.Tensor", [small, X((1, 4, 1))]),
    "mul Scalar": ("mul.Scalar", [small, -2]),
    "mul bool": ("mul.Tensor", [small, mask]),
    "rsub": ("rsub.Scalar", [small, 1]),
    "rsub Tensor": ("rsub.Tensor", [small, w(5)], {"alpha": 2}),
    "div": ("div.Tensor", [small, p(5)]),
    "div integer": ("div.Tensor", [X((1, 4), "index", 7), 2]),
    "div Scalar": ("div.Scalar", [small, 3]),
    "div floor": ("div.Tensor_mode", [small, 0.3], {"rounding_mode": "floor"}),
    "div trunc": ("div.Scalar_mode", [small, 0.3], {"rounding_mode": "trunc"}),
    "floor_divide": ("floor_divide.default", [small, 0.3]),
    "remainder": ("remainder.Tensor", [small, p(5)]),
    "remainder Scalar": ("remainder.Scalar", [small, 0.7]),
    "pow 2": ("pow.Tensor_Scalar", [small, 2]),
    "pow 3": ("pow.Tensor_Scalar", [small, 3]),
    "pow half": ("pow.Tensor_Scalar", [positive, 0.5]),
    "pow minus half": ("pow.Tensor_Scalar", [positive, -0.5]),
    "pow minus one": ("pow.Tensor_Scalar", [positive, -1]),
    "pow 1.7": ("pow.Tensor_Scalar", [positive, 1.7]),
    "pow Tensor": ("pow.Tensor_Tensor", [positive, p(5)]),
    "pow Scalar": ("pow.Scalar", [2, small]),
    "square": ("square.default", [small]),
    "maximum": ("maximum.default", [small, w(4, 5)]),
    "minimum": ("minimum.default", [small, w(4, 5)]),
    "max other": ("max.other", [small, X((1, 4, 5))]),
    "min other": ("min.other", [small, X((1, 4, 5))]),
    "addcmul": ("addcmul.default", [small, X((1, 4, 5)), w(5)], {"value": 0.5}),
    "lerp": ("lerp.Scalar", [small, X((1, 4, 5)), 0.3]),
    "lerp Tensor": ("lerp.Tensor", [small, X((1, 4, 5)), p(5)]),
    **{
        name: (f"{name}.default", [small])
        for name in ["neg", "abs", "sign", "exp", "expm1", "erf", "sin", "cos", "atan", "floor", "ceil", "round"]
    },
    **{name: (f"{name}.default", [positive]) for name in ["log", "log1p", "sqrt", "rsqrt", "reciprocal"]},
    "exp of integers": ("exp.default", [X((1, 4), "index", 3)]),
    # activations
    **{
        name: (f"{name}.default", [small])
        for name in [
            "relu",
            "relu6",
            "hardtanh",
            "celu",
            "selu",
            "sigmoid",
            "tanh",
            "silu",
            "mish",
            "hardswish",
            "hardsigmoid",
            "softplus",
            "log_sigmoid",
            "gelu",
            "leaky_relu",
            "elu",
        ]
    },
    "hardtanh relu6": ("hardtanh.default", [small, 0.0, 1.5]),
    "hardtanh relu": ("hardtanh.default", [small, 0.0, math.inf]),
    "clamp": ("clamp.default", [small, -0.5, 1]),
    "clamp low": ("clamp.default", [small, 0.2]),
    "clamp high": ("clamp.default", [small, None, 0.2]),
    "clamp Tensor": ("clamp.Tensor", [small, -p(5), p(5)]),
    "clamp Tensor high": ("clamp.Tensor", [small, None, p(5)]),
    "clamp_min": ("clamp_min.default", [small, 0]),
    "clamp_min Tensor": ("clamp_min.Tensor", [small, w(5)]),
    "clamp_max": ("clamp_max.default", [small, 0.5]),
    "clamp_max Tensor": ("clamp_max.Tensor", [small, w(5)]),
    "rrelu": ("rrelu.default", [small, 0.1, 0.3]),
    "prelu": ("prelu.default", [image, w(4)]),
    "prelu single": ("prelu.default", [image, w(1)]),
    "prelu 2d": ("prelu.default", [matrix, w(6)]),
    "softplus beta": ("softplus.default", [small, 2]),
    "gelu tanh": ("gelu.default", [small], {"approximate": "tanh"}),
    "glu": ("glu.default", [image, 1]),
    "threshold": ("threshold.default", [small, 0.3, -2]),
    # comparison and choice
    **{f"{name} Scalar": (f"{name}.Scalar", [small, 0.1]) for name in ["gt", "ge", "lt", "le"]},
    **{f"{name} Tensor": (f"{name}.Tensor", [small, w(5)]) for name in ["gt", "ge", "lt", "le"]},
    "eq Scalar": ("eq.Scalar", [X((1, 9), "index", 3), 1]),
    "ne Scalar": ("ne.Scalar", [X((1, 9), "index", 3), 1]),
    "eq Tensor": ("eq.Tensor", [X((1, 9), "index", 3), X((1, 9), "index", 3)]),
    "ne Tensor": ("ne.Tensor", [X((1, 9), "index", 3), X((1, 9), "index", 3)]),
    **{
        name: (f"{name}.{'default' if name[0] != '_' else 'Tensor'}", [mask, X((1, 4, 5), "bool")])
        for name in ["logical_and", "logical_or", "__and__", "__or__"]
    },
    "bitwise_and": ("bitwise_and.Tensor", [mask, X((1, 4, 5), "bool")]),
    "bitwise_or": ("bitwise_or.Tensor", [mask, X((1, 4, 5), "bool")]),
    "logical_not": ("logical_not.default", [mask]),
    "bitwise_not": ("bitwise_not.default", [mask]),
    "where": ("where.self", [mask, small, w(5)]),
    "where ScalarOther": ("where.ScalarOther", [mask, small, 0.5]),
    "where ScalarSelf": ("where.ScalarSelf", [mask, 0.5, small]),
    "where Scalar": ("where.Scalar", [mask, 0.5, 2.0]),
    "masked_fill": ("masked_fill.Scalar", [small, mask, -3]),
    "masked_fill Tensor": ("masked_fill.Tensor", [small, w(4, 5) > 0, torch.tensor(2.0)]),
    # nothing to do, casts, constants
    **{
        name: (f"{name}.default", [small])
        for name in ["contiguous", "clone", "detach", "alias", "lift_fresh_copy", "zeros_like", "ones_like"]
    },
    **{
        name: (f"{name}.default", [small, 0.5, False])
        for name in ["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"]
    },
    "to dtype": ("to.dtype", [small, torch.int64]),
    "to same dtype": ("to.dtype", [small, torch.float32]),
    "to device": ("to.device", [mask, torch.device("cpu"), torch.float32]),
    "to layout": ("to.dtype_layout", [mask], {"dtype": torch.float32}),
    "to other": ("to.other", [mask, small]),
    "_to_copy": ("_to_copy.default", [mask], {"dtype": torch.int32}),
    "type_as": ("type_as.default", [mask, small]),
    "new_zeros": ("new_zeros.default", [small, [2, 3]]),
    "new_ones": ("new_ones.default", [small, [2, 3]]),
    "full_like": ("full_like.default", [small, 2.5]),
    "new_full": ("new_full.default", [small, [2, 3], 4]),
    # reductions, softmax, normalisation
    "mean": ("mean.dim", [image, [2, 3]]),
    "mean keepdim": ("mean.dim", [image, [-1, -2], True]),
    "mean one": ("mean.dim", [image, [1]]),
    "mean all": ("mean.default", [image]),
    "sum": ("sum.dim_IntList", [image, [1], True]),
    "sum of bools": ("sum.dim_IntList", [mask, [1]]),
    "sum all": ("sum.default", [image]),
    "amax": ("amax.default", [image, [2, 3], True]),
    "amax one": ("amax.default", [image, [-1]]),
    "max all": ("max.default", [image]),
    "amin": ("amin.default", [image, [1]]),
    "min all": ("min.default", [image]),
    "prod": ("prod.dim_int", [small, 1]),
    "prod all": ("prod.default", [X((1, 4))]),
    "logsumexp": ("logsumexp.default", [small, [1], True]),
    "max dim": ("max.dim", [image, 1]),
    "min dim": ("min.dim", [image, -1, True]),
    "argmax": ("argmax.default", [image, 1]),
    "argmax all": ("argmax.default", [image]),
    "argmin": ("argmin.default", [image, -1, True]),
    "vector norm": ("linalg_vector_norm.default", [image, 2, [1], True]),
    "vector norm 1": ("linalg_vector_norm.default", [image, 1, [1, 2]]),
    "norm": ("norm.ScalarOpt_dim", [image, 2, [1]]),
    "var": ("var.correction", [image, [2, 3]], {"keepdim": True}),
    "var correction": ("var.correction", [image, [1]], {"correction": 0}),
    "var unbiased": ("var.dim", [image, [1, 2], False]),
    "std": ("std.correction", [image, [2, 3]]),
    "std unbiased": ("std.dim", [image, [1], True, True]),
    "var_mean": ("var_mean.correction", [image, [2, 3]]),
    "cumsum": ("cumsum.default", [image, -1]),
    "topk": ("topk.default", [image, 2, 1]),
    "softmax": ("softmax.int", [image, 1]),
    "_softmax": ("_softmax.default", [image, -1, False]),
    "log_softmax": ("log_softmax.int", [image, 1]),
    "_log_softmax": ("_log_softmax.default", [image, -1, False]),
    "layer_norm": ("layer_norm.default", [rows, [6], w(6), w(6), 1e-3]),
    "layer_norm two dims": ("layer_norm.default", [rows, [5, 6]]),
    "rms_norm": ("rms_norm.default", [rows, [6], w(6), 1e-3]),
    "rms_norm plain": ("rms_norm.default", [rows, [6]]),
    "group_norm": ("group_norm.default", [image, 2, w(4), w(4), 1e-3]),
    "group_norm one": ("group_norm.default", [image, 1, w(4), None]),
    "group_norm plain": ("group_norm.default", [image, 2]),
    "group_norm each": ("group_norm.default", [image, 4, w(4), w(4)]),
    "instance_norm": ("instance_norm.default", [image, w(4), None, None, None, True, 0.1, 1e-4, False]),
    # pooling
    "max_pool1d": ("max_pool1d.default", [X((1, 4, 9)), [3], [2], [1]]),
    "max_pool2d": ("max_pool2d.default", [image, [3, 3], [2, 2], [1, 1]]),
    "max_pool2d default stride": ("max_pool2d.default", [image, [3]]),
    "max_pool2d dilation": ("max_pool2d.default", [image, [2, 3], [1, 1], [1, 1], [2, 2]]),
    "max_pool2d ceil": ("max_pool2d.default", [image, [3, 3], [2, 2], [0, 0], [1, 1], True]),
    "max_pool2d ceil pad": ("max_pool2d.default", [X((1, 2, 6, 5)), [3, 3], [2, 2], [1, 1], [1, 1], True]),
    "max_pool3d": ("max_pool3d.default", [X((1, 2, 4, 5, 6)), [2, 2, 2]]),
    "avg_pool1d": ("avg_pool1d.default", [X((1, 4, 9)), [3], [2], [1]]),
    "avg_pool2d": ("avg_pool2d.default", [image, [3, 3], [2, 2], [1, 1]]),
    "avg_pool2d uncounted": ("avg_pool2d.default", [image, [3, 3], [2, 2], [1, 1], False, False]),
    "avg_pool2d ceil": ("avg_pool2d.default", [image, [3, 3], [2, 2], [0, 0], True]),
    "avg_pool2d ceil pad": ("avg_pool2d.default", [X((1, 2, 6, 5)), [3, 3], [2, 2], [1, 1], True]),
    "avg_pool2d ceil pad uncounted": ("avg_pool2d.default", [X((1, 2, 6, 5)), [3, 3], [2, 2], [1, 1], True, False]),
    "avg_pool2d divisor": ("avg_pool2d.default", [image, [3, 3], [2, 2], [1, 1], False, True, 5]),
    "avg_pool2d divisor ceil": ("avg_pool2d.default", [X((1, 2, 6, 5)), [3, 3], [2, 2], [1, 1], True, True, 5]),
    "avg_pool3d": ("avg_pool3d.default", [X((1, 2, 4, 5, 6)), [2, 2, 2]]),
    "adaptive_avg_pool1d": ("adaptive_avg_pool1d.default", [X((1, 4, 9)), [3]]),
    "adaptive_avg_pool2d": ("adaptive_avg_pool2d.default", [image, [1, 1]]),
    "adaptive_avg_pool2d even": ("adaptive_avg_pool2d.default", [image, [3, 4]]),
    "adaptive_avg_pool2d same": ("adaptive_avg_pool2d.default", [image, [9, 8]]),
    "adaptive_avg_pool2d uneven": ("adaptive_avg_pool2d.default", [image, [7, 7]]),
    "adaptive_avg_pool2d larger": ("adaptive_avg_pool2d.default", [X((1, 3, 2, 2)), [7, 7]]),
    "adaptive_avg_pool3d": ("adaptive_avg_pool3d.default", [X((1, 2, 4, 5, 6)), [1, 1, 1]]),
    "adaptive_max_pool1d": ("adaptive_max_pool1d.default", [X((1, 4, 9)), [1]]),
    "adaptive_max_pool2d": ("adaptive_max_pool2d.default", [image, [1, 1]]),
    "adaptive_max_pool2d even": ("adaptive_max_pool2d.default", [image, [3, 4]]),
    "adaptive_max_pool2d uneven": ("adaptive_max_pool2d.default", [image, [4, 3]]),
    "max_pool1d_with_indices": ("max_pool1d_with_indices.default", [X((1, 4, 9)), [3], [2], [1]]),
    "max_pool2d_with_indices": ("max_pool2d_with_indices.default", [image, [3, 3], [2, 2], [1, 1]]),
    # structure
    "view": ("view.default", [image, [1, -1]]),
    "view same": ("view.default", [image, [1, 4, 9, 8]]),
    "_unsafe_view": ("_unsafe_view.default", [image, [1, 36, 8]]),
    "reshape": ("reshape.default", [image, [4, 72]]),
    "view_as": ("view_as.default", [image, X((1, 36, 8))]),
    "reshape_as": ("reshape_as.default", [image, X((1, 36, 8))]),
    "flatten": ("flatten.using_ints", [image, 1]),
    "unflatten": ("unflatten.int", [image, 1, [2, 2]]),
    "squeeze": ("squeeze.default", [X((1, 4, 1, 3))]),
    "squeeze dim": ("squeeze.dim", [X((1, 4, 1, 3)), 2]),
    "squeeze dims": ("squeeze.dims", [X((1, 4, 1, 1)), [2, 3]]),
    "unsqueeze": ("unsqueeze.default", [image, -1]),
    "permute": ("permute.default", [image, [0, 2, 3, 1]]),
    "permute of ones": ("permute.default", [X((1, 4, 1, 5)), [0, 2, 1, 3]]),
    "transpose": ("transpose.int", [image, 1, -1]),
    "swapaxes": ("swapaxes.default", [image, 1, 2]),
    "t": ("t.default", [matrix]),
    "numpy_T": ("numpy_T.default", [rows]),
    "movedim": ("movedim.int", [image, 1, -1]),
    "movedim list": ("movedim.intlist", [image, [1, 2], [3, 1]]),
    "expand": ("expand.default", [X((1, 4, 1)), [1, -1, 5]]),
    "expand same": ("expand.default", [small, [1, -1, -1]]),
    "expand_as": ("expand_as.default", [X((1, 4, 1)), small]),
    "broadcast_to": ("broadcast_to.default", [X((1, 4, 1)), [2, 4, 5]]),
    "repeat": ("repeat.default", [small, [2, 1, 1, 3]]),
    "tile": ("tile.default", [small, [2]]),
    "cat": ("cat.default", [[image, X((1, 3, 9, 8)), w(1, 2, 9, 8)], 1]),
    "cat empty": ("cat.default", [[image, torch.zeros(0), X((1, 3, 9, 8))], -3]),
    "concat": ("concat.default", [[image, X((1, 4, 9, 8))], 2]),
    "stack": ("stack.default", [[image, X((1, 4, 9, 8))], 2]),
    "chunk": ("chunk.default", [image, 3, 2]),
    "split": ("split.Tensor", [image, 4, 2]),
    "split_with_sizes": ("split_with_sizes.default", [image, [1, 3], 1]),
    "split sizes": ("split.sizes", [image, [1, 3], 1]),
    "split into one": ("split.Tensor", [image, 4, 1]),
    "tensor_split": ("tensor_split.sections", [image, 2, 2]),
    "unbind": ("unbind.int", [image, 1]),
    "unbind one": ("unbind.int", [image, 0]),
    "select": ("select.int", [image, 1, -2]),
    "select of one": ("select.int", [image, 0, 0]),
    "slice": ("slice.Tensor", [image, 1, 1, -1]),
    "index_select": ("index_select.default", [image, 1, torch.tensor([3, 0, 0])]),
    "index": ("index.Tensor", [image, [None, torch.tensor([3, 0, 2])]]),
    "index 2d": ("index.Tensor", [image, [None, None, torch.tensor([[8, 0], [2, 2]])]]),
    "index mask": ("index.Tensor", [image, [None, torch.tensor([True, False, True, True])]]),
    "index of a table": ("index.Tensor", [w(7, 3), [X((1, 5), "index", 7)]]),
    "gather": ("gather.default", [small, 2, X((1, 4, 2), "index", 5)]),
    "embedding": ("embedding.default", [w(7, 3), X((1, 5), "index", 7)]),
    "flip": ("flip.default", [image, [1, 3]]),
    "roll": ("roll.default", [image, [2, -3], [1, 2]]),
    "roll nothing": ("roll.default", [image, [9], [2]]),
    "pad": ("pad.default", [image, [1, 2, 0, 3]]),
    "pad channels": ("pad.default", [image, [0, 0, 0, 0, 2, 3]]),
    "pad value": ("pad.default", [image, [1, 2], "constant", 1.5]),
    "pad negative": ("pad.default", [image, [-1, 2]]),
    "pad reflect": ("pad.default", [image, [1, 2, 2, 1], "reflect"]),
    "pad replicate": ("pad.default", [image, [1, 2, 2, 1], "replicate"]),
    "pad nothing": ("pad.default", [image, [0, 0]]),
    "constant_pad_nd": ("constant_pad_nd.default", [image, [1, 2], 0.5]),
    "reflection_pad1d": ("reflection_pad1d.default", [rows, [1, 2]]),
    "reflection_pad2d": ("reflection_pad2d.default", [image, [1, 2, 3, 0]]),
    "replication_pad1d": ("replication_pad1d.default", [rows, [1, 2]]),
    "replication_pad2d": ("replication_pad2d.default", [image, [1, 2, 3, 0]]),
    "pixel_shuffle": ("pixel_shuffle.default", [even, 2]),
    "pixel_unshuffle": ("pixel_unshuffle.default", [even, 2]),
    "channel_shuffle": ("channel_shuffle.default", [even, 2]),
    "native_channel_shuffle": ("native_channel_shuffle.default", [even, 2]),
    "nearest1d": ("upsample_nearest1d.default", [rows, [13]]),
    "nearest1d vec": ("upsample_nearest1d.vec", [rows, None, [2.0]]),
    "nearest": ("upsample_nearest2d.default", [image, [18, 16]]),
    "nearest odd size": ("upsample_nearest2d.default", [image, [13, 11]]),
    "nearest scale": ("upsample_nearest2d.vec", [image, None, [2.0, 3.0]]),
    "nearest odd scale": ("upsample_nearest2d.vec", [image, None, [1.6, 2.3]]),
    "nearest size": ("upsample_nearest2d.vec", [image, [4, 5], None]),
    "nearest same": ("upsample_nearest2d.vec", [image, [9, 8], None]),
    "nearest3d": ("upsample_nearest3d.default", [X((1, 2, 3, 4, 5)), [6, 8, 10]]),
    "nearest3d vec": ("upsample_nearest3d.vec", [X((1, 2, 3, 4, 5)), None, [2.0, 2.0, 2.0]]),
    "nearest exact": ("_upsample_nearest_exact2d.default", [image, [13, 11]]),
    "nearest exact vec": ("_upsample_nearest_exact2d.vec", [image, None, [2.0, 2.0]]),
    "linear1d": ("upsample_linear1d.default", [rows, [13], False]),
    "linear1d vec": ("upsample_linear1d.vec", [rows, None, True, [2.0]]),
    "bilinear": ("upsample_bilinear2d.default", [image, [18, 16], False]),
    "bilinear aligned": ("upsample_bilinear2d.default", [image, [18, 16], True]),
    "bilinear smaller": ("upsample_bilinear2d.vec", [image, [4, 3], False, None]),
    "bilinear odd scale": ("upsample_bilinear2d.vec", [image, None, False, [1.6, 2.3]]),
    "bilinear aligned odd": ("upsample_bilinear2d.vec", [image, [13, 11], True, None]),
    "bilinear to one": ("upsample_bilinear2d.vec", [image, [1, 1], False, None]),
    "bilinear same": ("upsample_bilinear2d.vec", [image, [9, 8], False, None]),
    "trilinear": ("upsample_trilinear3d.default", [X((1, 2, 3, 4, 5)), [6, 8, 10], False]),
    "trilinear vec": ("upsample_trilinear3d.vec", [X((1, 2, 3, 4, 5)), None, False, [2.0, 2.0, 2.0]]),
    "bicubic": ("upsample_bicubic2d.default", [image, [18, 16], False]),
    "bicubic vec": ("upsample_bicubic2d.vec", [image, [13, 11], True, None]),
    "grid_sampler": ("grid_sampler.default", [image, X((1, 5, 6, 2)), 0, 0, False]),
    "grid_sampler border": ("grid_sampler.default", [image, X((1, 5, 6, 2)), 0, 1, True]),
}

# the second result is not exported; what comes out is compared for the first alone
_FIRST_ONLY = {"max_pool1d_with_indices", "max_pool2d_with_indices"} | {k for k in CASES if "adaptive_max" in k}
# what comes out is what goes in, which only an Identity can say
_NO_WORK = {
    "view same", "expand same", "split into one", "roll nothing", "pad nothing", "nearest same", "bilinear same",
    "to same dtype", "adaptive_avg_pool2d same", "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "dropout",
    "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "zeros_like", "ones_like", "new_zeros", "new_ones",
    "full_like", "new_full",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_row_gives_what_torch_gives(case):
    name, args, *kwargs = CASES[case]
    network = network_of(name, args, *kwargs, first_only=case in _FIRST_ONLY)
    model = to_onnx(network)
    assert_clean(model, identity=case in _NO_WORK)
    assert largest_error(network, model) <= 1e-5


def test_every_row_has_a_case():
    tested = {overload(name) for name, *_ in CASES.values()}
    assert {str(o) for o in TABLE} == {str(o) for o in TABLE if o in tested}
