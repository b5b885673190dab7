"""Rows for pooling. Windows that reach past the border are written as explicit end padding, never as ceil_mode,
whose meaning differs between runtimes and their versions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeprune.deploy.emit import Arguments, Call, Edge
from edgeprune.deploy.rows.matrix import border

Row = Callable[[Call, Arguments], Any]


def _spread(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def _geometry(call: Call, a: Arguments, output: torch.Tensor) -> tuple[list[int], list[int], list[int], list[int]]:
    """kernel, stride, pad in front, pad behind (what the output's size needs, at least 0)."""
    rank = a.self.rank - 2
    if rank < 1:
        raise call.refuse("pooling without a batch dimension is not supported")
    kernel = _spread(a.kernel_size, rank)
    stride = _spread(a.stride, rank) if a.stride else kernel
    front = _spread(a.padding, rank)
    dilation = _spread(getattr(a, "dilation", 1), rank)
    behind = []
    for d in range(rank):
        reach = (int(output.shape[2 + d]) - 1) * stride[d] + dilation[d] * (kernel[d] - 1) + 1
        behind.append(max(reach - a.self.shape[2 + d] - front[d], front[d] if reach else 0))
    return kernel, stride, front, behind


def max_pool(call: Call, a: Arguments) -> Any:
    """With indices (the overload that returns a pair) only the values can be had."""
    pair = isinstance(call.meta, (tuple, list))
    output = call.meta[0] if pair else call.meta
    target = call.part(0) if pair else call
    kernel, stride, front, behind = _geometry(call, a, output)
    dilation = _spread(a.dilation, len(kernel))
    source, around = border(call, a.self, -math.inf)
    pads = [p + q for p, q in zip(front + behind, around, strict=True)]
    if max(pads) < min(kernel):  # what runtimes demand
        front, behind = pads[: len(kernel)], pads[len(kernel) :]
    else:
        source = a.self
    if source is a.self and border(call, a.self, 0.0)[0] is not a.self:
        _keep_border(call, a.self)
    result = target.out(
        "MaxPool", source, kernel_shape=kernel, strides=stride, pads=front + behind,
        dilations=dilation if any(d != 1 for d in dilation) else None,
    )  # fmt: skip
    return (result, None) if pair else result


def _keep_border(call: Call, edge: Edge) -> None:
    """onnxruntime's PadFusion (1.23 to 1.31) takes a border of zeros into a MaxPool, whose own border counts as minus
    infinity: wrong where all real values of a window are negative. It looks for a border of exactly zero, so this one
    becomes the smallest normal float."""
    node = call.emitter.producer(edge)
    assert node is not None
    del node.input[2:]
    node.input.append(call.scalar(torch.finfo(torch.float32).tiny, edge.dtype))


def avg_pool(call: Call, a: Arguments) -> Edge:
    kernel, stride, front, behind = _geometry(call, a, call.meta)
    past = behind != front  # windows reach beyond the padding, where torch does not count
    counted = bool(a.count_include_pad) and any(front)
    divisor = getattr(a, "divisor_override", None)
    source: Any = a.self
    if divisor is not None or (counted and past):
        # the padding is made explicit; what the pool itself adds behind is then never counted
        zeros = [0, 0, *front, 0, 0, *front]
        source = call.add("Pad", source, call.constant(zeros, "pads"), mode="constant") if any(front) else source
        behind = [b - f for b, f in zip(behind, front, strict=True)]
        front, counted = [0] * len(front), divisor is not None
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": front + behind}
    attributes["count_include_pad"] = 1 if counted else None
    if divisor is None:
        return call.out("AveragePool", source, **attributes)
    window = 1
    for k in kernel:
        window *= k
    mean = call.add("AveragePool", source, **attributes)
    return call.out("Mul", mean, call.scalar(window / divisor, call.meta.dtype))


def _windows(size: int, count: int) -> list[tuple[int, int]]:
    """torch's adaptive windows: [floor(i * size / count), ceil((i + 1) * size / count))"""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _uniform(small: Sequence[int], large: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Kernel and stride if all windows are equal and evenly spaced."""
    kernel, stride = [], []
    for count, size in zip(small, large, strict=True):
        windows = _windows(size, count)
        widths = {end - start for start, end in windows}
        steps = {b[0] - a[0] for a, b in itertools.pairwise(windows)} or {1}
        if len(widths) != 1 or len(steps) != 1 or 0 in steps:
            return None
        kernel.append(widths.pop())
        stride.append(steps.pop())
    return kernel, stride


def adaptive_avg_pool(call: Call, a: Arguments) -> Edge:
    small, large = tuple(int(d) for d in call.meta.shape[2:]), a.self.shape[2:]
    if small == large:
        return a.self
    if all(d == 1 for d in small):
        return call.out("GlobalAveragePool", a.self)
    uniform = _uniform(small, large)
    if uniform is not None:
        return call.out("AveragePool", a.self, kernel_shape=uniform[0], strides=uniform[1])
    # windows of different sizes: one matrix per dimension, H then W
    if len(small) != 2:
        raise call.refuse("adaptive pooling with uneven windows is supported for two dimensions only")
    rows, columns = (_averages(n, size, call.meta.dtype) for n, size in zip(small, large, strict=True))
    return call.out("MatMul", call.add("MatMul", rows, a.self, label="rows"), columns.t().contiguous())


def _averages(count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    matrix = torch.zeros(count, size, dtype=dtype)
    for i, (start, end) in enumerate(_windows(size, count)):
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def adaptive_max_pool(call: Call, a: Arguments) -> Any:
    pair = isinstance(call.meta, (tuple, list))
    output = call.meta[0] if pair else call.meta
    target = call.part(0) if pair else call
    small, large = tuple(int(d) for d in output.shape[2:]), a.self.shape[2:]
    result: Any
    uniform = _uniform(small, large)
    if small == large:
        result = a.self
    elif all(d == 1 for d in small):
        result = target.out("GlobalMaxPool", a.self)
    elif uniform is not None:
        result = target.out("MaxPool", a.self, kernel_shape=uniform[0], strides=uniform[1])
    else:  # gather the windows, the last element repeated where one is shorter, and take the maximum over each
        source: Any = a.self
        for d, (count, size) in enumerate(zip(small, large, strict=True)):
            windows = _windows(size, count)
            longest = max(end - start for start, end in windows)
            taken = [[min(start + j, end - 1) for j in range(longest)] for start, end in windows]
            spread = target.add("Gather", source, torch.tensor(taken), axis=2 + d)
            emit = target.out if d == len(small) - 1 else target.add
            source = emit("ReduceMax", spread, axes=[3 + d], keepdims=0)
        result = source
    return (result, None) if pair else result
