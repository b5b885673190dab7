"""Run a network on integer labels: which channels belong together.

A convolution or linear gives each output channel a fresh label, element-wise operators unite the labels they meet,
structural operators are executed on the labels themselves. Whatever is not understood is frozen, so that an unknown
network is pruned less, never wrongly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from edgeprune.graph import layers, ops, rules, structure
from edgeprune.graph.labels import frozen
from edgeprune.graph.network import Network
from edgeprune.graph.ops import Kind
from edgeprune.graph.tracer import Tracer

_RULES: dict[Kind | None, Callable[[Tracer, fx.Node], Any]] = {
    Kind.SIZE: rules.size,
    Kind.ELEMENTWISE: rules.elementwise,
    Kind.CHANNELWISE: rules.channelwise,
    Kind.POOLING: rules.pooling,
    Kind.REDUCTION: rules.reduction,
    Kind.ALONG: rules.along_dim,
    Kind.FACTORY: rules.factory,
    Kind.STRUCTURAL: structure.structural,
    Kind.MIXING: Tracer.refuse,
}


def propagate(network: Network) -> Tracer:
    """Labels of every node of a canonical network."""
    t = Tracer(network)
    for node in network.module.graph.nodes:
        if node.op == "placeholder" or any(n in t.batched for n in node.all_input_nodes):
            t.batched.add(node)
        t.env[node] = _value(t, node)
    return t


def _value(t: Tracer, node: fx.Node) -> Any:
    if node.op == "placeholder":
        return frozen(t.shapes[node.name])
    if node.op == "get_attr":
        return layers.bare(t, node)
    if node.op == "call_module":
        return layers.module(t, node)
    if node.op == "output":
        t.freeze(node.all_input_nodes)
        return None
    if node.target is operator.getitem:
        source = t.env[node.args[0]]
        index: Any = node.args[1]
        return source[index] if isinstance(source, (tuple, list)) else t.refuse(node)
    kind = ops.kind_of(node.target)
    if kind is None and any(t.tensors(n) for n in node.all_input_nodes):
        t.unknown[ops.name_of(node.target)] = None
    return _RULES.get(kind, Tracer.refuse)(t, node)
