"""Labels of modules and bare tensors: where fresh labels come from."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgeprune.graph.labels import Labels, along, frozen
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS
from edgeprune.graph.tracer import Tracer

# A bare tensor with more elements than this is a weight that the forward computes with; nothing there is ever cut.
_LARGEST_BARE = 1 << 16


def bare(t: Tracer, node: fx.Node) -> Any:
    """A parameter or buffer that is no module's. A vector has channels of its own (layer scale, the affine part of a
    norm); anything else is a weight or a map that stays whole, also where a module shares it."""
    tensor = operator.attrgetter(str(node.target))(t.network.module)
    if not isinstance(tensor, torch.Tensor):
        return None
    dims = [d for d, size in enumerate(tensor.shape) if size > 1]
    if len(dims) != 1 or tensor.numel() > _LARGEST_BARE or not tensor.is_floating_point():
        for dim in dims:
            t.share(tensor, dim, np.zeros(tensor.shape[dim], dtype=np.int64))
        return frozen(tensor.shape)
    ids = t.units.fresh(tensor.shape[dims[0]])
    t.share(tensor, dims[0], ids)
    return along(t.units, tensor.shape, dims[0], ids)


def module(t: Tracer, node: fx.Node) -> Labels:
    """Convolutions and linears give each output channel a fresh label; per-channel modules pass labels on."""
    module = t.network.module.get_submodule(str(node.target))
    x: Labels = t.env[node.args[0]]  # type: ignore[index]
    if isinstance(module, (*CONVS, *CONV_TRANSPOSES)):
        return _convolution(t, node, module, x)
    if isinstance(module, nn.Linear):
        last = len(x.shape) - 1
        ids, out = _entering(t, node, x, last), t.units.fresh(module.out_features)
        t.share(module.weight, 0, out)
        t.share(module.weight, 1, ids)
        t.share(module.bias, 0, out)
        return t.out(node, last, out)
    if isinstance(module, BATCH_NORMS):
        ids = _entering(t, node, x, 1)
        for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
            t.share(tensor, 0, ids)
        return t.out(node, 1, ids)
    return t.out(node, x.axis, x.ids)  # dropout


def _entering(t: Tracer, node: fx.Node, x: Labels, axis: int) -> np.ndarray:
    """The units along the axis that a module takes its channels from; labels along another one are frozen."""
    if x.axis != axis:
        t.freeze(node.all_input_nodes)
    return x.vector(axis)


def _convolution(t: Tracer, node: fx.Node, module: Any, x: Labels) -> Labels:
    """Plain, grouped, depthwise; transposed ones have their weight as (in, out / groups, ...)."""
    ids, groups = _entering(t, node, x, 1), module.groups
    transposed = isinstance(module, CONV_TRANSPOSES)
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if groups > 1 and groups == module.in_channels:  # depthwise: output i * m + j belongs to input i
        out = np.repeat(ids, module.out_channels // groups)
        t.share(module.weight, 0, ids if transposed else out)
    else:
        out = t.units.fresh(module.out_channels)
        if groups > 1:  # equal counts per group: the same offset in every group goes together
            t.couple(ids, groups)
            t.couple(out, groups)
        inner_in = ids if transposed else ids[: len(ids) // groups]
        inner_out = out[: len(out) // groups] if transposed else out
        t.share(module.weight, in_dim, inner_in)
        t.share(module.weight, out_dim, inner_out)
    t.share(module.bias, 0, out)
    return t.out(node, 1, out)
