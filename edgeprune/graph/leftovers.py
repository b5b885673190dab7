"""Activations that removed layers leave behind: ``phi(m * phi(z))``, where folding may not drop the outer one.

A relu there is dropped when the file is made, since it changes nothing (fold_scale.py). A SiLU, a GELU, or a relu6 in
front of which m exceeds one, does change something: it stays, and costs its time.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edgeprune.graph.network import Network
from edgeprune.graph.ops import Kind, kind_of
from edgeprune.graph.ranges import clamp_of, ranges

_MUL = torch.ops.aten.mul.Tensor


def lone_activations(network: Network, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Node name of every such activation -> what dropping it would change of the outputs: the squared difference over
    their squared size (>= 0). inputs: one (n, ...) tensor per network input."""
    module = network.module
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            whole = _outputs(_Without(module, None).run(*inputs))
            return {
                node.name: _difference(_outputs(_Without(module, node).run(*inputs)), whole)
                for node in _left_behind(module)
            }
    finally:
        module.train(training)


def _left_behind(module: fx.GraphModule) -> list[fx.Node]:
    known = ranges(module)
    found = []
    for node in module.graph.nodes:
        if not _is_activation(node):
            continue
        source = node.all_input_nodes[0]
        clamp, (low, high) = clamp_of(node), known[source]
        if clamp is not None and clamp[0] <= low and high <= clamp[1]:
            continue
        if _is_scaled(module, source):
            source = next(n for n in source.all_input_nodes if n.op != "get_attr")
        if source.target is node.target and source.args[1:] == node.args[1:]:
            found.append(node)
    return found


def _is_activation(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and kind_of(node.target) is Kind.ELEMENTWISE
        and node.target is not _MUL
        and len(node.all_input_nodes) == 1
    )


def _is_scaled(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node multiplies a value with a tensor of one element."""
    held = [n for n in node.all_input_nodes if n.op == "get_attr"]
    if node.target is not _MUL or len(held) != 1 or len(node.all_input_nodes) != 2:
        return False
    return bool(operator.attrgetter(str(held[0].target))(module).numel() == 1)


class _Without(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, dropped: fx.Node | None):
        super().__init__(module)
        self.dropped = dropped

    def run_node(self, n: fx.Node) -> Any:
        return self.env[n.all_input_nodes[0]] if n is self.dropped else super().run_node(n)


def _outputs(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return error / max(sum(float(b.double().square().sum()) for b in theirs), 1e-30)
