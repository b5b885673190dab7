"""How large a network is: parameters and multiply-accumulates at its input shapes, batch 1.

Counted are convolutions, transposed convolutions, linears and matrix products (modules and functional calls), as in
the tables of papers; element-wise work, pooling and normalisation are not. They say nothing about latency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from edgeprune.graph.network import CONV_TRANSPOSES, CONVS, Network, shapes

aten = torch.ops.aten

_CONV_CALLS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
_TRANSPOSE_CALLS = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)


@dataclass(frozen=True, slots=True)
class Size:
    """``params``: weights and biases, shared ones once. ``macs``: multiply-accumulates of one sample."""

    params: int
    macs: int


def count(network: Network) -> Size:
    """Parameters and multiply-accumulates. A module called twice counts its parameters once and its work twice."""
    known = shapes(network)
    macs = sum(_macs(node, network.module, known) for node in network.module.graph.nodes)
    params = sum(p.numel() for p in network.module.parameters())
    return Size(params, macs)


def _macs(node: fx.Node, module: fx.GraphModule, known: dict[str, tuple[int, ...]]) -> int:
    if node.op == "call_module":
        leaf: Any = module.get_submodule(str(node.target))
        source = known[node.all_input_nodes[0].name]
        if isinstance(leaf, CONV_TRANSPOSES):
            return math.prod(source) * math.prod(leaf.weight.shape[1:])
        if isinstance(leaf, (*CONVS, nn.Linear)):
            return math.prod(known[node.name]) * math.prod(leaf.weight.shape[1:])
        return 0
    if node.op != "call_function":
        return 0
    operands = [known[a.name] for a in node.args if isinstance(a, fx.Node) and a.name in known]
    if node.target in (*_CONV_CALLS, aten.linear.default):
        return math.prod(known[node.name]) * math.prod(operands[1][1:])
    if node.target in _TRANSPOSE_CALLS:
        return math.prod(operands[0]) * math.prod(operands[1][1:])
    if node.target in _PRODUCTS:
        return math.prod(known[node.name]) * operands[0][-1]
    if node.target is aten.addmm.default:
        return math.prod(known[node.name]) * operands[1][-1]
    if node.target is aten.scaled_dot_product_attention.default:
        query, key, value = operands[:3]
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0
