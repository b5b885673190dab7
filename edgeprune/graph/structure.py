"""Labels through operators that move elements: they are executed on the labels themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgeprune.graph import ops
from edgeprune.graph.labels import Labels, from_tensor
from edgeprune.graph.ops import arguments
from edgeprune.graph.tracer import Tracer


def structural(t: Tracer, node: fx.Node) -> Any:
    """Run the operator on integers that stand for its input's elements. Joins and pads are done without, since
    they would write out all of a map's positions."""
    name = ops.name_of(node.target)
    inputs = [v for n in node.all_input_nodes for v in t.tensors(n)]
    if all(v.axis is None for v in inputs):
        return t.refuse(node)
    special = {"cat": _cat, "concat": _cat, "stack": _stack, "pad": _pad, "constant_pad_nd": _pad}.get(name)
    if special is not None:
        return special(t, node)
    (x,) = inputs if len(inputs) == 1 else (None,)
    if x is None or not _refittable(t, node, name, x):
        return t.refuse(node)
    if name in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"):
        return _rearranged(t, node, name, x)
    try:
        if name in ("view", "_unsafe_view"):  # the labels' strides are not those of the tensor itself
            result = x.tensor().reshape(t.evaluated(arguments(node)["size"]))
        else:
            result = node.target(*t.evaluated(node.args), **t.evaluated(node.kwargs))  # type: ignore[operator]
    except Exception:
        return t.refuse(node)
    unflattened = len(x.shape) == 2 and isinstance(result, torch.Tensor) and result.dim() > 2
    first = node not in t.batched
    if isinstance(result, (tuple, list)):
        return tuple(from_tensor(t.units, piece, first) for piece in result)
    labels = from_tensor(t.units, result, first, 1 if unflattened else None)
    if labels.shape != t.shapes.get(node.name) or _size_is_computed(t, node, name, labels):
        if labels.ids is not None:
            t.units.freeze(labels.ids)
        return t.refuse(node)
    return labels


def _refittable(t: Tracer, node: fx.Node, name: str, x: Labels) -> bool:
    """Whether the operator's arguments can be refitted when channels of its input are cut."""
    args = arguments(node)
    rank = len(x.shape)
    dim = args.get("dim")
    on_axis = isinstance(dim, int) and dim % rank == x.axis
    if name in ("roll", "flip"):
        dims = args["dims"]
        return bool(dims) and x.axis not in {d % rank for d in dims}
    if name in ("index_select", "repeat_interleave"):
        return isinstance(dim, int) and not on_axis
    if name in ("reflection_pad1d", "replication_pad1d"):
        return x.axis is not None and x.axis < rank - 1
    if name in ("reflection_pad2d", "replication_pad2d"):
        return x.axis is not None and x.axis < rank - 2
    if on_axis and name in ("slice", "narrow", "split", "split_with_sizes", "select"):
        numbers = [args.get(k) for k in ("start", "end", "length", "split_size", "split_sizes", "index")]
        flat = [v for n in numbers for v in (n if isinstance(n, (list, tuple)) else [n])]
        return not any(isinstance(v, fx.Node) for v in flat) and args.get("step", 1) == 1
    return True


def _size_is_computed(t: Tracer, node: fx.Node, name: str, out: Labels) -> bool:
    """Whether the output's size along its axis is a number computed in the graph, which no refit can change."""
    args = arguments(node)
    if out.axis is None:
        return False
    if name in ("view", "reshape", "_unsafe_view", "expand"):
        return isinstance(args["size" if "size" in args else "shape"][out.axis], fx.Node)
    if name == "unflatten":
        position = out.axis - int(args["dim"]) % (len(out.shape) - len(args["sizes"]) + 1)
        return 0 <= position < len(args["sizes"]) and isinstance(args["sizes"][position], fx.Node)
    return False


def _cat(t: Tracer, node: fx.Node) -> Labels | None:
    """Along the channels: one after the other. Along another dim: the pieces' channels are the same."""
    args = arguments(node)
    pieces = [v for n in args["tensors"] for v in t.tensors(n)]
    dim = int(args["dim"]) % len(t.shapes[node.name])
    axes = {v.axis for v in pieces if v.axis is not None}
    if any(len(v.shape) <= dim for v in pieces):
        return t.refuse(node)
    if axes == {dim}:
        return t.out(node, dim, np.concatenate([v.vector(dim) for v in pieces]))
    return _joined(t, node, pieces, axes, shift=False, dim=dim)


def _stack(t: Tracer, node: fx.Node) -> Labels | None:
    """Along a dim that did not exist: the pieces' channels are the same."""
    args = arguments(node)
    pieces = [v for n in args["tensors"] for v in t.tensors(n)]
    dim = int(args["dim"]) % len(t.shapes[node.name])
    return _joined(t, node, pieces, {v.axis for v in pieces if v.axis is not None}, shift=True, dim=dim)


def _joined(t: Tracer, node: fx.Node, pieces: Sequence[Labels], axes: set[int], shift: bool, dim: int) -> Labels | None:
    """Joined along another dim than their channels: the pieces' channels are the same."""
    if len(axes) != 1:
        return t.refuse(node)
    (axis,) = axes
    ids = pieces[0].vector(axis)
    for v in pieces[1:]:
        t.units.unite(ids, v.vector(axis))
    return t.out(node, axis + (shift and dim <= axis), ids)


def _pad(t: Tracer, node: fx.Node) -> Labels | None:
    """A zero channel is a channel that exists and unites with what it is added to."""
    args = arguments(node)
    (x,) = t.tensors(args["self"])
    assert x.axis is not None
    assert x.ids is not None
    from_back = len(x.shape) - 1 - x.axis
    amounts = args["pad"][2 * from_back : 2 * from_back + 2]
    if not amounts or tuple(amounts) == (0, 0):
        return t.out(node, x.axis, x.ids)
    if any(isinstance(a, fx.Node) or a < 0 for a in amounts) or args.get("mode", "constant") != "constant":
        return t.refuse(node)
    before, after = (t.units.fresh(a) for a in amounts)
    return t.out(node, x.axis, np.concatenate([before, x.ids, after]))


def _rearranged(t: Tracer, node: fx.Node, name: str, x: Labels) -> Labels | None:
    """Pixel and channel shuffles, on one position of the image instead of all."""
    if x.axis != 1 or ("pixel" in name and len(x.shape) != 4):
        return t.refuse(node)
    assert x.ids is not None
    if name == "pixel_shuffle":
        r = int(arguments(node)["upscale_factor"])
        rows = x.ids.reshape(-1, r * r)
        t.units.unite(rows, rows[:, :1])
        return t.out(node, 1, rows[:, 0])
    if name == "pixel_unshuffle":
        return t.out(node, 1, np.repeat(x.ids, int(arguments(node)["downscale_factor"]) ** 2))
    groups = int(arguments(node)["groups"])
    t.couple(x.ids, groups)
    return t.out(node, 1, x.ids.reshape(groups, -1).T.ravel())
