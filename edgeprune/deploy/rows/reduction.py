"""Rows for reductions, softmax and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeprune.deploy.emit import Arguments, Call, Edge

Row = Callable[[Call, Arguments], Any]


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or (not isinstance(dim, int) and not len(dim)):
        return list(range(rank))
    return sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim))


def _reduced(call: Call, op: str, source: Any, axes: Sequence[int], keepdim: bool, out: bool = True) -> Any:
    """One reduction; ReduceSum alone takes its axes as an input in this opset."""
    emit = call.out if out else call.add
    if op == "ReduceSum":
        return emit(op, source, call.constant(list(axes), "axes"), keepdims=int(keepdim))
    return emit(op, source, axes=list(axes), keepdims=int(keepdim))


def reduce(op: str, pooled: str | None = None) -> Row:
    """``pooled``: the global pooling that does the same over all of height and width, which runtimes do faster."""

    def row(call: Call, a: Arguments) -> Edge:
        source: Edge = a.self
        rank, keepdim = source.rank, bool(getattr(a, "keepdim", False))
        axes = _axes(getattr(a, "dim", None), rank)
        data = call.tensor(source, call.meta.dtype)
        if pooled is not None and rank >= 3 and axes == list(range(2, rank)) and call.meta.dtype.is_floating_point:
            if keepdim:
                return call.out(pooled, data)
            shape = call.constant([int(d) for d in call.meta.shape], "shape")
            return call.out("Reshape", call.add(pooled, data), shape)
        return _reduced(call, op, data, axes, keepdim)

    return row


def extreme(op: str, position: str) -> Row:
    """max.dim, min.dim: (values, positions)."""

    def row(call: Call, a: Arguments) -> tuple[Edge, Edge]:
        axis = a.dim % a.self.rank
        values, positions = call.part(0), call.part(1)
        return (
            values.out(op, a.self, axes=[axis], keepdims=int(a.keepdim)),
            positions.out(position, a.self, axis=axis, keepdims=int(a.keepdim)),
        )

    return row


def position(op: str) -> Row:
    def row(call: Call, a: Arguments) -> Edge:
        if a.dim is None:
            flat = call.add("Reshape", a.self, call.constant([-1], "shape"))
            return call.out(op, flat, axis=0, keepdims=0)
        return call.out(op, a.self, axis=a.dim % a.self.rank, keepdims=int(a.keepdim))

    return row


def vector_norm(call: Call, a: Arguments) -> Edge:
    order = getattr(a, "ord", None)
    order = order if order is not None else getattr(a, "p", 2)
    op = {1: "ReduceL1", 2: "ReduceL2", None: "ReduceL2"}.get(order)
    if op is None:
        raise call.refuse(f"norm of order {order} is not supported")
    return _reduced(call, op, a.self, _axes(a.dim, a.self.rank), bool(a.keepdim))


def _variance(call: Call, a: Arguments, out: Call | None) -> tuple[str, Any]:
    """(mean, kept dims; variance). ``out``: the call whose result the variance is, or None for a helper tensor."""
    axes = _axes(a.dim, a.self.rank)
    count = 1
    for d in axes:
        count *= a.self.shape[d]
    correction = getattr(a, "correction", None)
    if hasattr(a, "unbiased"):
        correction = int(bool(a.unbiased))
    rest = max(count - (1 if correction is None else correction), 0)
    mean = call.add("ReduceMean", a.self, axes=axes, keepdims=1, label="mean")
    centred = call.add("Sub", a.self, mean)
    total = _reduced(call, "ReduceSum", call.add("Mul", centred, centred), axes, bool(a.keepdim), out=False)
    divisor = call.scalar(float(rest), a.self.dtype)
    return mean, (call.add("Div", total, divisor) if out is None else out.out("Div", total, divisor))


def var(call: Call, a: Arguments) -> Edge:
    return _variance(call, a, call)[1]


def std(call: Call, a: Arguments) -> Edge:
    return call.out("Sqrt", _variance(call, a, None)[1])


def var_mean(call: Call, a: Arguments) -> tuple[Edge, Edge]:
    variance, mean = call.part(0), call.part(1)
    kept, result = _variance(call, a, variance)
    return result, mean.out("Reshape", kept, call.constant([int(d) for d in call.meta[1].shape], "shape"))


def softmax(op: str) -> Row:
    def row(call: Call, a: Arguments) -> Edge:
        return call.out(op, call.tensor(a.self, call.meta.dtype), axis=a.dim % a.self.rank)

    return row


def cumsum(call: Call, a: Arguments) -> Edge:
    return call.out("CumSum", call.tensor(a.self, call.meta.dtype), call.scalar(a.dim % a.self.rank, torch.int64))


def topk(call: Call, a: Arguments) -> tuple[Edge, ...]:
    return call.outs(
        "TopK",
        a.self,
        call.constant([a.k], "k"),
        axis=a.dim % a.self.rank,
        largest=int(a.largest),
        sorted=int(a.sorted),
    )


def layer_norm(call: Call, a: Arguments) -> Edge:
    shape, dtype = [int(d) for d in a.normalized_shape], call.meta.dtype
    scale = a.weight if a.weight is not None else torch.ones(shape, dtype=dtype)
    return call.out("LayerNormalization", a.input, scale, a.bias, axis=-len(shape), epsilon=float(a.eps))


def rms_norm(call: Call, a: Arguments) -> Edge:
    source: Edge = a.input
    axes = list(range(source.rank - len(a.normalized_shape), source.rank))
    eps = a.eps if a.eps is not None else torch.finfo(source.dtype).eps
    square = call.add("ReduceMean", call.add("Mul", source, source), axes=axes, keepdims=1)
    root = call.add("Sqrt", call.add("Add", square, call.scalar(eps, source.dtype)))
    if a.weight is None:
        return call.out("Div", source, root)
    return call.out("Mul", call.add("Div", source, root), a.weight)


def group_norm(call: Call, a: Arguments) -> Edge:
    """ONNX has a right GroupNormalization from opset 21 on: groups as instances of an instance norm."""
    source: Edge = a.input
    channels, groups, dtype = source.shape[1], int(a.num_groups), call.meta.dtype
    if groups == channels and source.rank > 2:
        return instance_norm(call, a)
    flat = call.add("Reshape", source, call.constant([source.shape[0], groups, -1], "groups"))
    ones, zeros = torch.ones(groups, dtype=dtype), torch.zeros(groups, dtype=dtype)
    normal = call.add("InstanceNormalization", flat, ones, zeros, epsilon=float(a.eps))
    back = call.constant(list(source.shape), "shape")
    affine = [(op, v) for op, v in (("Mul", a.weight), ("Add", a.bias)) if v is not None]
    result: Any = call.add("Reshape", normal, back, label="back") if affine else call.out("Reshape", normal, back)
    for i, (op, value) in enumerate(affine):
        shaped = _per_channel(call, value, source.rank)
        result = (call.out if i == len(affine) - 1 else call.add)(op, result, shaped)
    return result


def instance_norm(call: Call, a: Arguments) -> Edge:
    if getattr(a, "use_input_stats", True) is False:
        raise call.refuse("instance norm with running statistics is not supported")
    channels, dtype = a.input.shape[1], call.meta.dtype
    scale = a.weight if a.weight is not None else torch.ones(channels, dtype=dtype)
    shift = a.bias if a.bias is not None else torch.zeros(channels, dtype=dtype)
    return call.out("InstanceNormalization", a.input, scale, shift, epsilon=float(a.eps))


def _per_channel(call: Call, value: Any, rank: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return call.add("Reshape", value, call.constant([-1, *[1] * (rank - 2)], "channels"))
    shaped = value.detach().reshape(-1, *[1] * (rank - 2))
    if id(value) in call.emitter.names:
        call.emitter.names[id(shaped)] = call.emitter.names[id(value)]
    return shaped
