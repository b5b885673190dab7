"""Constant factors move into weights, and clamps that change nothing go.

What is left of a removed residual layer is ``relu(m * x)``. With x >= 0 and m >= 0 the relu does nothing; the factor
then goes forward into all weights that read it, or else back into the layer that made x. In between lie operators with
``f(m * x) == m * f(x)``: averages, reshapes and the like for any m, relu and maxima for m >= 0.

Exact: nothing is done unless all readers take the factor. A relu6 goes where 6 m <= 6; in front of any other
activation the factor stays, as a multiplication.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from edgeprune.graph import ops
from edgeprune.graph.affine import Affine, absorb, attenuate
from edgeprune.graph.affine_nodes import DIV, MUL, AffineNodes, per_channel
from edgeprune.graph.ops import Kind, name_of
from edgeprune.graph.ranges import clamp_of, ranges
from edgeprune.graph.sharing import own_modules

_LINEAR = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
)  # fmt: skip
_POSITIVE = (
    "relu", "leaky_relu", "abs", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d",
)  # fmt: skip
_MOVING = ("mean", "sum", "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "slice")


def drop_idle_clamps(module: fx.GraphModule) -> None:
    """Take out every relu, relu6, hardtanh and clamp whose input lies within its bounds anyway."""
    known = ranges(module)
    for node in list(module.graph.nodes):
        clamp = clamp_of(node)
        if clamp is None:
            continue
        source = node.all_input_nodes[0]
        low, high = known[source]
        if clamp[0] <= low and high <= clamp[1]:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)


def move_scales(nodes: AffineNodes, names: dict[fx.Node, str]) -> None:
    """Move every multiplication with a constant into the weights behind it, or those before it, where that is exact.

    names: new names of nodes, which is added to: a node that gives another value now has another name
    """
    graph = nodes.module.graph
    for node in list(graph.nodes):
        source = nodes.source(node)
        scale = _scale(nodes, node) if source is not None else None
        if source is None or scale is None or not node.users:
            continue
        readers = _readers(nodes, node, scale)
        if readers is not None:
            weighted, passed = readers
            for leaf in own_modules(nodes.module, weighted):
                attenuate(leaf, scale)
            for between in passed:
                names[between] = f"{names.get(between, between.name)}_unscaled"
        elif (chain := _makers(nodes, node, scale)) is not None:
            (leaf,) = own_modules(nodes.module, chain[-1:])
            absorb(leaf, [Affine(scale, scale.new_zeros(()))])
            for between in chain:
                names[between] = f"{names.get(between, between.name)}_scaled"
            names[chain[0]] = names.get(node, node.name)
        else:
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _scale(nodes: AffineNodes, node: fx.Node) -> torch.Tensor | None:
    """() or (C,), C at dim 1, of a multiplication with a constant or a division by one."""
    if node.op != "call_function" or node.target not in (MUL, DIV):
        return None
    source = nodes.source(node)
    value = nodes.constant(next(a for a in node.args if a is not source))
    shape = nodes.shape(node)
    if value is None or source is None or nodes.shape(source) != shape or len(shape) < 2:
        return None
    flat = per_channel(value, shape[1], len(shape), 1)
    return flat if flat is None or node.target is MUL else 1 / flat


def _readers(nodes: AffineNodes, node: fx.Node, scale: torch.Tensor) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """(layers that take the factor into their weights, nodes in between), None if some reader cannot."""
    weighted: dict[fx.Node, None] = {}
    passed: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        last = waiting.pop()
        for user in last.users:
            if user.op == "call_function" and ops.kind_of(user.target) is Kind.SIZE:
                continue
            if nodes.is_weighted(user) and _takes(nodes, user, scale):
                weighted[user] = None
            elif _commutes(nodes, user, last, scale):
                if user not in passed:
                    passed[user] = None
                    waiting.append(user)
            else:
                return None
    return list(weighted), list(passed)


def _takes(nodes: AffineNodes, layer: fx.Node, scale: torch.Tensor) -> bool:
    return scale.dim() == 0 or not isinstance(nodes.leaf(layer), nn.Linear) or nodes.rank(layer) == 2


def _makers(nodes: AffineNodes, node: fx.Node, scale: torch.Tensor) -> list[fx.Node] | None:
    """From what ``node`` reads back to the layer that can take the factor, if nobody else reads any of it."""
    chain: list[fx.Node] = []
    last = node
    while True:
        source = last.all_input_nodes[0]
        if last is node:
            source = nodes.source(node) or source
        if len(source.users) != 1:
            return None
        chain.append(source)
        if nodes.is_weighted(source):
            return chain if _takes(nodes, source, scale) else None
        if source.op != "call_function" or not _commutes(nodes, source, source.all_input_nodes[0], scale):
            return None
        last = source


def _commutes(nodes: AffineNodes, node: fx.Node, source: fx.Node, scale: torch.Tensor) -> bool:
    """Whether ``node``, fed with ``scale * source``, gives ``scale`` times what it gave."""
    if node.op != "call_function" or not node.all_input_nodes or node.all_input_nodes[0] is not source:
        return False
    others: list[Any] = [n for n in node.all_input_nodes[1:] if n.op != "get_attr"]
    if any(ops.kind_of(n.target) is not Kind.SIZE for n in others):
        return False
    name = name_of(node.target)
    if name in _MOVING:
        return scale.dim() == 0
    if node.target in (MUL, DIV):
        return nodes.source(node) is source and nodes.shape(source) == nodes.shape(node)
    return name in _LINEAR or (name in _POSITIVE and bool((scale >= 0).all()))
