"""Rows for operators that move elements: reshape, permute, cat, split, pad, gather, resize."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeprune.deploy.emit import Arguments, Call, Edge

Row = Callable[[Call, Arguments], Any]


def reshape(call: Call, a: Arguments) -> Edge:
    """Whatever only regroups the elements: view, flatten, squeeze, unsqueeze, ..."""
    source: Edge = a.self
    if source.shape == tuple(call.meta.shape):
        return source
    return call.out("Reshape", source, call.constant([int(d) for d in call.meta.shape], "shape"))


def permuted(call: Call, source: Edge, order: Sequence[int]) -> Edge:
    order = [d % source.rank for d in order]
    if order == list(range(source.rank)):
        return source
    moved = [d for d in order if source.shape[d] != 1]
    if moved == sorted(moved):  # only dimensions of size 1 change place
        return call.out("Reshape", source, call.constant([int(d) for d in call.meta.shape], "shape"))
    return call.out("Transpose", source, perm=order)


def permute(call: Call, a: Arguments) -> Edge:
    return permuted(call, a.self, a.dims)


def transpose(call: Call, a: Arguments) -> Edge:
    order = list(range(a.self.rank))
    first, second = (a.dim0, a.dim1) if hasattr(a, "dim0") else (a.axis0, a.axis1)
    order[first], order[second] = order[second], order[first]
    return permuted(call, a.self, order)


def t(call: Call, a: Arguments) -> Edge:
    return permuted(call, a.self, range(a.self.rank)[::-1])


def movedim(call: Call, a: Arguments) -> Edge:
    given = [[d] if isinstance(d, int) else list(d) for d in (a.source, a.destination)]
    source, destination = ([d % a.self.rank for d in dims] for dims in given)
    order = [d for d in range(a.self.rank) if d not in source]
    for d, s in sorted(zip(destination, source, strict=True)):
        order.insert(d, s)
    return permuted(call, a.self, order)


def expand(call: Call, a: Arguments) -> Edge:
    if a.self.shape == tuple(call.meta.shape):
        return a.self
    return call.out("Expand", a.self, call.constant([int(d) for d in call.meta.shape], "shape"))


def repeat(call: Call, a: Arguments) -> Edge:
    times = list(getattr(a, "repeats", None) or a.dims)
    source: Any = a.self
    shape = [1] * (len(times) - a.self.rank) + list(a.self.shape)
    times = [1] * (len(shape) - len(times)) + times
    if all(n == 1 for n in times):
        return reshape(call, a)
    if len(shape) > a.self.rank:
        source = call.add("Reshape", source, call.constant(shape, "shape"))
    return call.out("Tile", source, call.constant(times, "repeats"))


def cat(call: Call, a: Arguments) -> Any:
    dtype = call.meta.dtype
    parts = [v for v in a.tensors if math.prod(v.shape) or len(v.shape) == call.meta.dim()]
    parts = [v for v in parts if math.prod(v.shape)] or parts[:1]
    if len(parts) == 1 and isinstance(parts[0], Edge) and parts[0].dtype == dtype:
        return parts[0]
    return call.out("Concat", *(call.tensor(v, dtype) for v in parts), axis=a.dim % call.meta.dim())


def stack(call: Call, a: Arguments) -> Edge:
    axis, dtype = a.dim % call.meta.dim(), call.meta.dtype
    shape = [int(d) for d in call.meta.shape]
    shape[axis] = 1
    parts = [call.add("Reshape", call.tensor(v, dtype), call.constant(shape, "shape")) for v in a.tensors]
    return call.out("Concat", *parts, axis=axis)


def split(call: Call, a: Arguments) -> Any:
    """chunk, split, split_with_sizes, tensor_split: the sizes are in the result's shapes."""
    axis = a.dim % a.self.rank
    sizes = [int(part.shape[axis]) for part in call.meta]
    if len(sizes) == 1:
        return (a.self,)
    return call.outs("Split", a.self, call.constant(sizes, "sizes"), axis=axis)


def unbind(call: Call, a: Arguments) -> tuple[Edge, ...]:
    axis, count = a.dim % a.self.rank, len(call.meta)
    shape = call.constant([int(d) for d in call.meta[0].shape], "shape")
    if count == 1:
        return (call.part(0).out("Reshape", a.self, shape),)
    parts = [call.emitter.fresh(f"{call.name}.slice{i}") for i in range(count)]
    call.emitter.node("Split", [a.self.name], parts, f"{call.label}.split", {"axis": axis})
    return tuple(call.part(i).out("Reshape", part, shape) for i, part in enumerate(parts))


def select(call: Call, a: Arguments) -> Edge:
    axis = a.dim % a.self.rank
    if a.self.shape[axis] == 1:
        return reshape(call, a)
    index = call.scalar(a.index % a.self.shape[axis], torch.int64)
    return call.out("Gather", a.self, index, axis=axis)


def index_select(call: Call, a: Arguments) -> Edge:
    return call.out("Gather", a.self, call.tensor(a.index, torch.int64), axis=a.dim % a.self.rank)


def index(call: Call, a: Arguments) -> Edge:
    """``x[:, i]`` with one index tensor; a mask that is known becomes the positions it selects."""
    given = [(d, i) for d, i in enumerate(a.indices) if i is not None]
    if len(given) != 1:
        raise call.refuse("indexing by several tensors at once is not supported")
    axis, positions = given[0]
    if isinstance(positions, torch.Tensor) and positions.dtype == torch.bool:
        if positions.dim() != 1:
            raise call.refuse("indexing by a mask of more than one dimension is not supported")
        positions = positions.nonzero()[:, 0]
    elif isinstance(positions, Edge) and positions.dtype == torch.bool:
        raise call.refuse("indexing by a computed mask is not supported")
    return call.out("Gather", a.self, call.tensor(positions, torch.int64), axis=axis)


def gather(call: Call, a: Arguments) -> Edge:
    return call.out("GatherElements", a.self, call.tensor(a.index, torch.int64), axis=a.dim % a.self.rank)


def embedding(call: Call, a: Arguments) -> Edge:
    return call.out("Gather", a.weight, a.indices, axis=0)


def flip(call: Call, a: Arguments) -> Edge:
    axes = [d % a.self.rank for d in a.dims]
    ends = ([-1] * len(axes), [-(2**62)] * len(axes), axes, [-1] * len(axes))
    names = ("starts", "ends", "axes", "steps")
    return call.out("Slice", a.self, *(call.constant(v, n) for v, n in zip(ends, names, strict=True)))


def roll(call: Call, a: Arguments) -> Any:
    source, dims = a.self, list(a.dims)
    if not dims:
        raise call.refuse("roll without dimensions is not supported")
    moves = [(d % source.rank, s % source.shape[d]) for d, s in zip(dims, a.shifts, strict=True)]
    moves = [(d, s) for d, s in moves if s]
    if not moves:
        return source
    for i, (axis, shift) in enumerate(moves):
        size = a.self.shape[axis]
        halves = [call.emitter.fresh(f"{call.name}.{part}") for part in ("head", "tail")]
        sizes = call.constant([size - shift, shift], "sizes")
        call.emitter.node("Split", [call.tensor(source), sizes], halves, f"{call.label}.split", {"axis": axis})
        last = i == len(moves) - 1
        source = (call.out if last else call.add)("Concat", *halves[::-1], axis=axis)
    return source


def pad(mode: str | None = None) -> Row:
    """``mode`` None: the argument ``mode`` says it."""

    def row(call: Call, a: Arguments) -> Edge:
        kind = mode or a.mode
        amounts = getattr(a, "pad", None) or a.padding
        if not any(amounts):
            return a.self
        onnx_mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}.get(kind)
        if onnx_mode is None:
            raise call.refuse(f"padding mode {kind} is not supported")
        rank, n = a.self.rank, len(amounts) // 2
        begin, end = [0] * rank, [0] * rank
        for i in range(n):
            begin[rank - 1 - i], end[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
        inputs = [a.self, call.constant(begin + end, "pads")]
        value = getattr(a, "value", None) or 0.0
        if kind == "constant" and value != 0:
            inputs.append(call.scalar(value, call.meta.dtype))
        return call.out("Pad", *inputs, mode=onnx_mode)

    return row


def pixel_shuffle(call: Call, a: Arguments) -> Edge:
    return call.out("DepthToSpace", a.self, blocksize=a.upscale_factor, mode="CRD")


def pixel_unshuffle(call: Call, a: Arguments) -> Edge:
    n, c, h, w = a.self.shape
    r = a.downscale_factor
    split_shape = call.constant([n, c, h // r, r, w // r, r], "split")
    moved = call.add("Transpose", call.add("Reshape", a.self, split_shape), perm=[0, 1, 3, 5, 2, 4])
    return call.out("Reshape", moved, call.constant([int(d) for d in call.meta.shape], "shape"))


def channel_shuffle(call: Call, a: Arguments) -> Edge:
    n, c, *rest = a.self.shape
    rows = call.add("Reshape", a.self, call.constant([n, a.groups, c // a.groups, *rest], "split"))
    moved = call.add("Transpose", rows, perm=[0, 2, 1, *range(3, 3 + len(rest))])
    return call.out("Reshape", moved, call.constant([n, c, *rest], "shape"))


_RESIZES: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    # torch takes floor((i + 0.5) * scale), which is half_pixel rounded up at one half
    "nearest_exact": {
        "mode": "nearest",
        "coordinate_transformation_mode": "half_pixel",
        "nearest_mode": "round_prefer_ceil",
    },
    "linear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "cubic": {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
}


def resize(kind: str) -> Row:
    """upsample_*: by scales where the sizes are whole multiples or the caller gave scales that reach them, else by
    sizes. The scale enters the sampling positions, so that one of the caller's must not be replaced by the ratio."""

    def row(call: Call, a: Arguments) -> Edge:
        source: Edge = getattr(a, "self", None) or a.input
        rank = source.rank - 2
        attributes: dict[str, Any] = {**_RESIZES[kind]}
        align = bool(getattr(a, "align_corners", False))
        if align:
            attributes["coordinate_transformation_mode"] = "align_corners"
        small, large = source.shape[2:], tuple(int(d) for d in call.meta.shape[2:])
        scales: list[float] | None = None
        given = getattr(a, "scale_factors", None) or [
            getattr(a, f"scales{axis}", None) for axis in (("",), ("_h", "_w"), ("_d", "_h", "_w"))[rank - 1]
        ]
        if all(big % little == 0 for little, big in zip(small, large, strict=True)):
            scales = [big / little for little, big in zip(small, large, strict=True)]
        elif not align and all(s is not None for s in given):
            scales = [float(s) for s in given]
        if small == large and kind != "cubic":
            return source
        if scales is not None:
            single = torch.tensor([1.0, 1.0, *scales], dtype=torch.float32)
            reached = [math.floor(d * float(s)) for d, s in zip(small, single[2:], strict=True)]
            if tuple(reached) == large:
                return call.out("Resize", source, "", call.constant(single, "scales"), **attributes)
        sizes = call.constant([*source.shape[:2], *large], "sizes")
        return call.out("Resize", source, "", "", sizes, **attributes)

    return row


def grid_sample(call: Call, a: Arguments) -> Edge:
    mode = ("bilinear", "nearest", "bicubic")[a.interpolation_mode]
    padding = ("zeros", "border", "reflection")[a.padding_mode]
    return call.out(
        "GridSample", a.input, a.grid, mode=mode, padding_mode=padding, align_corners=int(bool(a.align_corners))
    )
