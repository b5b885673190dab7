"""Rows for convolutions, linears, matrix products and attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from edgeprune.deploy.emit import Arguments, Call, Edge
from edgeprune.deploy.rows.elementwise import binary

Row = Callable[[Call, Arguments], Any]


def _spread(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def border(call: Call, edge: Edge, value: float) -> tuple[Any, list[int]]:
    """If ``edge`` is a tensor with a border of ``value`` around it: that tensor and the border, front then behind.

    A convolution or pooling pads by itself, so that the copy which a Pad makes is saved.
    """
    rank = edge.rank - 2
    node = call.emitter.producer(edge)
    nothing = edge, [0] * (2 * rank)
    if node is None or node.op_type != "Pad" or node.attribute[0].s != b"constant":
        return nothing
    given = call.emitter.value(node.input[2]) if len(node.input) > 2 else np.zeros((), np.float32)
    pads = call.emitter.value(node.input[1])
    if given is None or pads is None or float(given) != value:
        return nothing
    pads = pads.reshape(2, rank + 2)
    if pads[:, :2].any() or (pads < 0).any():
        return nothing
    return node.input[0], [int(p) for p in pads[:, 2:].reshape(-1)]


def conv(call: Call, a: Arguments) -> Edge:
    """Plain convolution, 1d to 3d; padding as numbers, "same" or "valid"."""
    rank = a.input.rank - 2
    shape = tuple(int(d) for d in a.weight.shape[2:])
    dilation = _spread(a.dilation, rank)
    if a.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, shape, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = [0] * (2 * rank) if a.padding == "valid" else _spread(a.padding, rank) * 2
    source, around = border(call, a.input, 0.0)
    pads = [p + q for p, q in zip(pads, around, strict=True)]
    return call.out(
        "Conv", source, a.weight, a.bias, kernel_shape=shape, strides=_spread(a.stride, rank), pads=pads,
        dilations=dilation, group=int(a.groups),
    )  # fmt: skip


def scale_and_shift(call: Call, a: Arguments) -> Edge | None:
    """``x * scale + shift`` per channel of an image (what folding leaves of a batch norm with nothing before it) as a
    depthwise 1x1 convolution; None where the addition is something else.

    onnxruntime takes the activation behind it in and keeps its blocked layout around it: DenseNet-121 at 224 runs in
    26.4 ms instead of the 29.7 ms with Mul and Add; at widths that are no multiple of 16 both cost the same (1.31,
    AVX-512, one thread).
    """
    if not isinstance(a.self, Edge) or a.self.rank != 4 or not isinstance(a.other, torch.Tensor) or a.alpha != 1:
        return None
    channels = a.self.shape[1]
    node = call.emitter.producer(a.self)
    if node is None or node.op_type != "Mul" or channels == 1 or a.self.dtype != torch.float32:
        return None
    scale = call.emitter.value(node.input[1])
    shapes = (channels, 1, 1), (1, channels, 1, 1)
    if scale is None or scale.shape not in shapes or tuple(a.other.shape) not in shapes:
        return None
    source = call.emitter.edges.get(node.input[0])
    if source is None or source.shape != a.self.shape:
        return None
    weight, bias = torch.from_numpy(scale.reshape(channels, 1, 1, 1).copy()), a.other.detach().reshape(channels)
    call.emitter.names[id(weight)] = f"{node.input[1]}"
    call.emitter.names[id(bias)] = call.emitter.names.get(id(a.other), f"{call.name}.shift")
    ones = [1, 1]
    return call.out(
        "Conv", source, weight, bias, kernel_shape=ones, strides=ones, pads=[0] * 4, dilations=ones, group=channels
    )


def add(call: Call, a: Arguments) -> Edge:
    found = scale_and_shift(call, a)
    return binary("Add")(call, a) if found is None else found


def conv_transpose(call: Call, a: Arguments) -> Edge:
    rank = a.input.rank - 2
    return call.out(
        "ConvTranspose", a.input, a.weight, a.bias, kernel_shape=tuple(int(d) for d in a.weight.shape[2:]),
        strides=_spread(a.stride, rank), pads=_spread(a.padding, rank) * 2, dilations=_spread(a.dilation, rank),
        output_padding=_spread(a.output_padding, rank), group=int(a.groups),
    )  # fmt: skip


def convolution(call: Call, a: Arguments) -> Edge:
    return (conv_transpose if a.transposed else conv)(call, a)


def linear(call: Call, a: Arguments) -> Edge:
    if a.input.rank == 2:
        return call.out("Gemm", a.input, a.weight, a.bias, transB=1)
    weight: Any = a.weight
    if isinstance(weight, torch.Tensor):
        turned = weight.detach().t().contiguous()
        name = call.emitter.names.get(id(weight))
        if name is not None:
            call.emitter.names[id(turned)] = name
        weight = turned
    else:
        weight = call.add("Transpose", weight, perm=[1, 0])
    if a.bias is None:
        return call.out("MatMul", a.input, weight)
    return call.out("Add", call.add("MatMul", a.input, weight), a.bias)


def matmul(call: Call, a: Arguments) -> Edge:
    dtype = call.meta.dtype
    other = getattr(a, "other", None)
    other = other if other is not None else a.mat2
    return call.out("MatMul", call.tensor(a.self, dtype), call.tensor(other, dtype))


def addmm(call: Call, a: Arguments) -> Edge:
    bias = a.self
    if len(bias.shape) <= 2:
        return call.out("Gemm", a.mat1, a.mat2, bias, alpha=float(a.alpha), beta=float(a.beta))
    raise call.refuse("its bias has more than two dimensions")


def baddbmm(call: Call, a: Arguments) -> Edge:
    product, dtype = call.add("MatMul", a.batch1, a.batch2), call.meta.dtype
    if a.alpha != 1:
        product = call.add("Mul", product, call.scalar(a.alpha, dtype))
    bias = a.self if a.beta == 1 else call.add("Mul", a.self, call.scalar(a.beta, dtype), label="bias")
    return call.out("Add", bias, product)


def einsum(call: Call, a: Arguments) -> Edge:
    return call.out("Einsum", *a.tensors, equation=a.equation.replace(" ", ""))


def attention(call: Call, a: Arguments) -> Edge:
    """softmax(scale * Q K^T + mask) V, written out."""
    if a.dropout_p:
        raise call.refuse("it is in training mode (dropout)")
    if getattr(a, "enable_gqa", False):
        raise call.refuse("grouped queries are not supported")
    rank, dtype = len(a.query.shape), call.meta.dtype
    scale = a.scale if a.scale is not None else 1 / math.sqrt(int(a.query.shape[-1]))
    turned = call.add("Transpose", a.key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = call.add("MatMul", call.add("Mul", a.query, call.scalar(float(scale), dtype)), turned, label="scores")
    mask = a.attn_mask
    if a.is_causal:
        ones = torch.ones(int(a.query.shape[-2]), int(a.key.shape[-2]), dtype=torch.bool)
        mask = ones.tril()
    if mask is not None:
        scores = call.add("Add", scores, _additive(call, mask, dtype))
    return call.out("MatMul", call.add("Softmax", scores, axis=rank - 1), a.value)


def _additive(call: Call, mask: Any, dtype: torch.dtype) -> str:
    """True keeps, False becomes minus infinity; a float mask is added as it is."""
    if mask.dtype != torch.bool:
        return call.tensor(mask, dtype)
    if isinstance(mask, torch.Tensor):
        return call.tensor(torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf))
    return call.add("Where", mask, call.scalar(0.0, dtype), call.scalar(-math.inf, dtype))


def folded_batch_norm(call: Call, a: Arguments) -> Edge:
    """A batch norm that is no module: its statistics must be constants."""
    constants: Sequence[Any] = (a.running_mean, a.running_var, a.weight, a.bias)
    if a.training or a.running_mean is None:
        raise call.refuse("it takes the statistics of the batch; call eval() and keep running statistics")
    if any(isinstance(c, Edge) for c in constants):
        raise call.refuse("its statistics or weights are computed while the network runs")
    scale = torch.rsqrt(a.running_var.double() + a.eps)
    if a.weight is not None:
        scale = scale * a.weight.detach().double()
    shift = -a.running_mean.double() * scale
    if a.bias is not None:
        shift = shift + a.bias.detach().double()
    shape = (-1, *[1] * (a.input.rank - 2))
    dtype = call.meta.dtype
    scaled = call.add("Mul", a.input, scale.to(dtype).reshape(shape))
    return call.out("Add", scaled, shift.to(dtype).reshape(shape))
