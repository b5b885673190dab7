"""Size arguments that were baked into a graph, refitted to the channels that survive a cut, or are there several times
after widening.

A view, split, slice or pad carries numbers that count channels. Each is counted again among the survivors. Operators
that need no refit (permute, flatten, cat, ...) are in no row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import fx

from edgeprune.graph import ops
from edgeprune.graph.channels import Channels
from edgeprune.graph.ops import arguments, set_argument

aten = torch.ops.aten


class Survivors:
    """How often every position of every node's output is there: not at all, once, or several times."""

    def __init__(self, channels: Channels, copies: np.ndarray):
        """copies: (units + 1,) int64 by global unit, the last entry (what is in no group) 1."""
        self._channels = channels
        self._copies = copies

    def of(self, node: fx.Node) -> tuple[int, np.ndarray] | None:
        """(axis, copies per position along it), or None where all are there once."""
        found = self._channels.vector(node.name)
        if found is None:
            return None
        copies = self._copies[found[1]]
        return None if (copies == 1).all() else (found[0], copies)

    def index(self, node: fx.Node) -> np.ndarray | None:
        """The old position of each new one along the axis of ``of``. What was one channel may be a run of positions by
        now: the copies of a run follow it as a whole."""
        found = self.of(node)
        if found is None or (found[1] <= 1).all():
            return None if found is None else np.flatnonzero(found[1])
        _, ids = self._channels.vector(node.name) or found
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(ids)) + 1)
        return np.concatenate([np.tile(run, found[1][run[0]]) for run in runs])

    def size(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of the node's output at batch 1 afterwards."""
        shape = list(self._channels.labels[node.name].shape)
        found = self.of(node)
        if found is not None:
            shape[found[0]] = int(found[1].sum())
        return tuple(shape)


def refit(node: fx.Node, survivors: Survivors) -> None:
    """Recount the arguments of one call, in place."""
    rule = _RULES.get(ops.name_of(node.target))
    if rule is not None:
        rule(node, survivors)


def _sizes(argument: str) -> Callable[[fx.Node, Survivors], None]:
    """The whole output shape stands in one argument (view, expand, zeros, ...)."""

    def rule(node: fx.Node, survivors: Survivors) -> None:
        found = survivors.of(node)
        if found is None:
            return
        axis, stays = found
        name = argument if argument in arguments(node) else "shape"
        sizes = list(arguments(node)[name])
        if sizes[axis] != -1:
            sizes[axis] = int(stays.sum())
        set_argument(node, name, sizes)

    return rule


def _unflatten(node: fx.Node, survivors: Survivors) -> None:
    found = survivors.of(node)
    if found is None:
        return
    args = arguments(node)
    sizes = list(args["sizes"])
    rank = len(survivors.size(node)) - len(sizes) + 1
    position = found[0] - args["dim"] % rank
    if 0 <= position < len(sizes) and sizes[position] != -1:
        sizes[position] = int(found[1].sum())
        set_argument(node, "sizes", sizes)


def _input_along(node: fx.Node, survivors: Survivors, dim: int) -> np.ndarray | None:
    """The survivors of the first input if they lie along ``dim``."""
    source = node.all_input_nodes[0]
    found = survivors.of(source)
    return found[1] if found is not None and found[0] == dim % len(survivors.size(source)) else None


def _split(node: fx.Node, survivors: Survivors) -> None:
    """split, chunk and split_with_sizes all become split_with_sizes."""
    args = arguments(node)
    stays = _input_along(node, survivors, args["dim"])
    if stays is None:
        return
    if "chunks" in args:
        step = -(-len(stays) // args["chunks"])
        sizes: Sequence[int] = [min(step, len(stays) - i) for i in range(0, len(stays), step)]
    elif "split_size" in args and isinstance(args["split_size"], int):
        step = args["split_size"]
        sizes = [min(step, len(stays) - i) for i in range(0, len(stays), step)]
    else:
        sizes = args["split_sizes" if "split_sizes" in args else "split_size"]
    ends = np.cumsum(sizes)
    counts = [int(stays[end - size : end].sum()) for end, size in zip(ends, sizes, strict=True)]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], counts, args["dim"]), {}


def _slice(node: fx.Node, survivors: Survivors) -> None:
    args = arguments(node)
    stays = _input_along(node, survivors, args["dim"])
    if stays is None:
        return
    start, end, _ = slice(args["start"], args["end"]).indices(len(stays))
    before, within = int(stays[:start].sum()), int(stays[start:end].sum())
    set_argument(node, "start", before)
    set_argument(node, "end", before + within)


def _narrow(node: fx.Node, survivors: Survivors) -> None:
    args = arguments(node)
    stays = _input_along(node, survivors, args["dim"])
    if stays is None:
        return
    start = args["start"] % len(stays)
    set_argument(node, "start", int(stays[:start].sum()))
    set_argument(node, "length", int(stays[start : start + args["length"]].sum()))


def _select(node: fx.Node, survivors: Survivors) -> None:
    args = arguments(node)
    stays = _input_along(node, survivors, args["dim"])
    if stays is not None:
        set_argument(node, "index", int(stays[: args["index"] % len(stays)].sum()))


def _pad(node: fx.Node, survivors: Survivors) -> None:
    found = survivors.of(node)
    if found is None:
        return
    axis, stays = found
    pad = list(arguments(node)["pad"])
    position = 2 * (len(survivors.size(node)) - 1 - axis)
    if position < len(pad):
        before, after = pad[position : position + 2]
        pad[position] = int(stays[:before].sum())
        pad[position + 1] = int(stays[len(stays) - after :].sum())
        set_argument(node, "pad", pad)


def _group_norm(node: fx.Node, survivors: Survivors) -> None:
    """Only a norm of one channel per group changes its number of groups; otherwise the groups lose equally many."""
    found = survivors.of(node)
    if found is not None and arguments(node)["num_groups"] == len(found[1]):
        set_argument(node, "num_groups", int(found[1].sum()))


def _layer_norm(node: fx.Node, survivors: Survivors) -> None:
    shape = list(arguments(node)["normalized_shape"])
    set_argument(node, "normalized_shape", list(survivors.size(node)[-len(shape) :]))


_RULES: dict[str, Callable[[fx.Node, Survivors], None]] = {
    "view": _sizes("size"),
    "reshape": _sizes("shape"),
    "_unsafe_view": _sizes("size"),
    "expand": _sizes("size"),
    "zeros": _sizes("size"),
    "ones": _sizes("size"),
    "full": _sizes("size"),
    "empty": _sizes("size"),
    "new_zeros": _sizes("size"),
    "new_ones": _sizes("size"),
    "new_full": _sizes("size"),
    "new_empty": _sizes("size"),
    "unflatten": _unflatten,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
}
