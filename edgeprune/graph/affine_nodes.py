"""Reading per-channel affine maps off the nodes of a graph: batch norms and arithmetic with constants."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from edgeprune.graph.affine import Affine, of_batch_norm
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, Network, shapes

aten = torch.ops.aten

MUL, ADD = aten.mul.Tensor, aten.add.Tensor
DIV, SUB = aten.div.Tensor, aten.sub.Tensor
_RSUBS = (aten.rsub.Scalar, aten.rsub.Tensor)


class AffineNodes:
    """What the nodes of ``network``'s graph do to each channel, as long as its modules keep their weights."""

    def __init__(self, network: Network):
        self.network = network
        self.module = network.module
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def leaf(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target))

    def is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.leaf(node), BATCH_NORMS)

    def is_weighted(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.leaf(node), (*CONVS, *CONV_TRANSPOSES, nn.Linear))

    def source(self, node: fx.Node) -> fx.Node | None:
        """The one activation that ``node`` reads, if it can be a per-channel affine map of it."""
        if self.is_norm(node):
            return node.all_input_nodes[0]
        if node.op != "call_function" or node.target not in (MUL, ADD, DIV, SUB, *_RSUBS):
            return None
        if set(node.kwargs) - {"alpha"} or len(node.args) != 2:
            return None
        activations = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(activations) != 1 or (node.target is DIV and node.args[0] is not activations[0]):
            return None
        return activations[0]

    def affine(self, node: fx.Node, producer: fx.Node) -> Affine | None:
        """The map of ``node`` over the output channels of the weighted layer that ``producer`` calls."""
        leaf = self.leaf(producer)
        if node.op == "call_module":
            if isinstance(leaf, nn.Linear) and self.rank(producer) != 2:
                return None  # the batch norm's channels are not the linear's features
            return of_batch_norm(self.leaf(node))
        other = next(a for a in node.args if a is not self.source(node))
        value = self.constant(other)
        if value is None:
            return None
        if isinstance(leaf, nn.Linear):
            channels, rank, dim = leaf.out_features, self.rank(producer), self.rank(producer) - 1
        else:
            channels, rank, dim = leaf.out_channels, leaf.weight.dim(), 1
        flat = per_channel(value, channels, rank, dim)
        return None if flat is None else _map_of(node, other, flat)

    def constant(self, value: Any) -> torch.Tensor | None:
        """float64 of a number or a floating-point tensor that the module holds, else None."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(float(value), dtype=torch.float64)
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = operator.attrgetter(str(value.target))(self.module)
            return tensor.detach().double() if tensor.is_floating_point() else None
        return None

    def rank(self, node: fx.Node) -> int:
        return len(self.shape(node))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of the node's output at batch 1, in the network as it was when this was first asked."""
        if self._shapes is None:
            self._shapes = shapes(self.network)
        return self._shapes[node.name]


def per_channel(value: torch.Tensor, channels: int, rank: int, dim: int) -> torch.Tensor | None:
    """``value`` as (channels,) or () if, broadcast to ``rank`` dimensions, it varies along ``dim`` at most."""
    if value.dim() > rank:
        return None
    full = (1,) * (rank - value.dim()) + tuple(value.shape)
    if any(size != 1 and not (d == dim and size == channels) for d, size in enumerate(full)):
        return None
    return value.reshape(-1) if value.numel() == channels else value.reshape(())


def _map_of(node: fx.Node, other: Any, value: torch.Tensor) -> Affine:
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if node.target is MUL:
        return Affine(value, zero)
    if node.target is DIV:
        return Affine(1 / value, zero)
    alpha: Any = node.kwargs.get("alpha", 1)
    if node.target in _RSUBS:  # args[1] - alpha * args[0]
        return Affine(-one * alpha, value) if node.args[1] is other else Affine(one, -alpha * value)
    if node.target is ADD:
        return Affine(one, alpha * value) if node.args[1] is other else Affine(one * alpha, value)
    return Affine(one, -alpha * value) if node.args[1] is other else Affine(-one * alpha, value)
