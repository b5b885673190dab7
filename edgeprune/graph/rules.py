"""Labels through every kind of operator that does not move elements around; structure.py has those that do."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from edgeprune.graph import ops
from edgeprune.graph.labels import Labels, along, frozen
from edgeprune.graph.ops import arguments
from edgeprune.graph.tracer import Tracer


def size(t: Tracer, node: fx.Node) -> Any:
    """Numbers are computed as they are. One that counts channels may lead anywhere, so those are frozen."""
    args, kwargs = node.args, node.kwargs
    if node.target is torch.ops.aten.sym_size.int:
        x = t.env[args[0]]  # type: ignore[index]
        dim = int(arguments(node)["dim"]) % len(x.shape)
        if dim == x.axis:
            t.units.freeze(x.ids)
        return x.shape[dim]
    if any(t.tensors(n) for n in node.all_input_nodes):
        return t.refuse(node)
    try:
        return node.target(*t.evaluated(args), **t.evaluated(kwargs))  # type: ignore[operator]
    except Exception:
        return None  # a number that only a real run knows


def elementwise(t: Tracer, node: fx.Node) -> Labels | None:
    """Broadcasting: an operand of size 1 along the labelled axis serves any number of channels."""
    shape = t.shapes.get(node.name)
    if shape is None:
        return t.refuse(node)
    operands = [v for n in node.all_input_nodes for v in t.tensors(n)]
    axes = {v.axis + len(shape) - len(v.shape) for v in operands if v.axis is not None}
    if len(axes) != 1:
        return t.refuse(node)
    (axis,) = axes
    ids: np.ndarray | None = None
    for v in operands:
        own = axis - (len(shape) - len(v.shape))
        if own < 0 or v.shape[own] == 1:
            continue
        vector = v.vector(own)
        if ids is not None:
            t.units.unite(ids, vector)
        ids = vector
    if ids is None or len(ids) != shape[axis]:
        return t.refuse(node)
    return t.out(node, axis, ids)


def channelwise(t: Tracer, node: fx.Node) -> Labels | None:
    """Norms, prelu, glu: labels pass, and the operator's own parameters have the same labels. A norm over channels
    takes its statistics over the kept ones, in the cut network as in the oracle."""
    name, args = ops.name_of(node.target), arguments(node)
    x: Labels = t.env[args["self"] if "self" in args else args["input"]]
    if x.axis is None or x.ids is None:
        return t.refuse(node)
    parameters = [t.env[args[k]] for k in ("weight", "bias", "running_mean", "running_var")
                  if isinstance(args.get(k), fx.Node)]  # fmt: skip
    own = 0
    if name in ("layer_norm", "rms_norm"):
        own = x.axis - (len(x.shape) - len(args["normalized_shape"]))
        if own < 0:
            t.freeze(n for n in node.all_input_nodes if t.env[n] is not x)
            return t.out(node, x.axis, x.ids)
    elif name == "glu":
        if int(args["dim"]) % len(x.shape) != x.axis:
            return t.out(node, x.axis, x.ids)
        first, second = np.split(x.ids, 2)
        t.units.unite(first, second)
        return t.out(node, x.axis, first)
    elif x.axis != 1:
        return t.refuse(node)
    elif name == "group_norm" and args["num_groups"] != x.shape[1]:
        t.couple(x.ids, int(args["num_groups"]))
    for p in parameters:
        if len(p.shape) > own and p.shape[own] == x.shape[x.axis]:
            t.units.unite(x.ids, p.vector(own))
        elif not (name == "prelu" and np.prod(p.shape) == 1):
            return t.refuse(node)
    return t.out(node, x.axis, x.ids)


def pooling(t: Tracer, node: fx.Node) -> Any:
    """Works on the last k dims; labels along one of them are lost."""
    (x,) = t.tensors(node.all_input_nodes[0])
    spatial = ops.SPATIAL_DIMS[ops.name_of(node.target)]
    if x.axis is None or x.axis >= len(x.shape) - spatial:
        return t.refuse(node)
    shape = t.shapes.get(node.name)
    if shape is not None:
        return t.out(node, x.axis, x.ids)
    # values and indices; the users of both are getitem nodes, whose shapes are known
    users = {u.args[1]: t.shapes[u.name] for u in node.users if u.target is operator.getitem}
    return tuple(along(t.units, users[i], x.axis, x.ids) if i in users else None for i in range(2))  # type: ignore[index, arg-type]


def reduction(t: Tracer, node: fx.Node) -> Any:
    """Over other dims labels pass. Over channels only a sum is the same with the masked ones as without them."""
    shape = t.shapes.get(node.name)
    values = t.tensors(node.all_input_nodes[0])
    args = arguments(node)
    if shape is None or len(values) != 1 or len(node.all_input_nodes) != 1:
        return t.refuse(node)
    (x,) = values
    rank = len(x.shape)
    dim = args.get("dim")
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = {int(d) % rank for d in dims} if rank else set()
    if x.axis is None or x.axis in dims:
        return frozen(shape) if ops.name_of(node.target) == "sum" else t.refuse(node)
    keep = bool(args.get("keepdim", False))
    axis = x.axis if keep else x.axis - sum(d < x.axis for d in dims)
    return t.out(node, axis, x.ids)


def along_dim(t: Tracer, node: fx.Node) -> Any:
    """Labels pass unless the operator works along them."""
    (x,) = t.tensors(node.all_input_nodes[0])
    dim = arguments(node).get("dim")
    if node.name not in t.shapes or not isinstance(dim, int) or x.axis in (None, dim % len(x.shape)):
        return t.refuse(node)
    return t.out(node, x.axis, x.ids)


def factory(t: Tracer, node: fx.Node) -> Any:
    """A constant has no channels of its own: those along dim 1 (or its only one) follow whatever they meet."""
    shape = t.shapes.get(node.name)
    model = arguments(node).get("self")  # new_zeros(x, ...) takes nothing but its type from x
    if not shape or any(t.tensors(n) for n in node.all_input_nodes if n is not model):
        return t.refuse(node)
    axis = min(1, len(shape) - 1)
    if isinstance(arguments(node)["size"][axis], fx.Node):
        return frozen(shape)
    return t.out(node, axis, t.units.fresh(shape[axis]))
