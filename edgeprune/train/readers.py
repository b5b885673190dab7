"""The layers that read a channel group: where a mask or a gate lies, so that it acts on every reader and nothing else.

On a reader's input no batch norm lies between what is multiplied there and the weights that read it, whatever norms,
additions and depthwise convolutions the channels have come through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from edgeprune.graph.channels import ChannelGroup, Channels
from edgeprune.graph.network import BATCH_NORMS, Network
from edgeprune.graph.ops import name_of

_ACTIVATIONS = """
    relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish hardsigmoid hardswish sigmoid tanh softplus
    """


@dataclass(frozen=True, slots=True)
class Reader:
    """One call of a layer that reads a group.

    call:   which of the calls of its module
    index:  (units, multiplicity) positions of the group's units along its input channels
    norm, activation: what directly follows
    output: (channels,) the global unit of each output channel, -1 where it belongs to no group; empty if none does
    """

    path: str
    call: int
    index: np.ndarray
    norm: nn.Module | None
    activation: fx.Node | None
    output: np.ndarray


def find_readers(network: Network, channels: Channels, group: ChannelGroup) -> list[Reader]:
    """All calls of convolutions and linear layers that mix the group's channels."""
    calls = network.modules_called()
    found = []
    for slot in group.slots:
        for call, node in enumerate(calls.get(slot.target, []) if slot.role == "in" else []):
            norm = _norm_after(network, node)
            activation = _only_user(node if norm is None else next(iter(node.users)))
            if activation is not None and not _is_activation(activation):
                activation = None
            vector = channels.vector(node.name)
            output = np.empty(0, np.int64) if vector is None else vector[1]
            found.append(Reader(slot.target, call, slot.index, norm, activation, output))
    return found


def _norm_after(network: Network, node: fx.Node) -> nn.Module | None:
    user = _only_user(node)
    leaf = network.module.get_submodule(str(user.target)) if user is not None and user.op == "call_module" else None
    return leaf if isinstance(leaf, BATCH_NORMS) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_activation(node: fx.Node) -> bool:
    return (
        node.op == "call_function" and name_of(node.target) in _ACTIVATIONS.split() and len(node.all_input_nodes) == 1
    )


def along(leaf: nn.Module, values: Tensor, x: Tensor) -> Tensor:
    """Values (channels,) or (rows, channels), shaped to be multiplied with what ``leaf`` reads or gives."""
    if isinstance(leaf, nn.Linear):
        return values if values.dim() == 1 else values.reshape(len(values), *(1,) * (x.dim() - 2), -1)
    rows = 1 if values.dim() == 1 else len(values)
    return values.reshape(rows, -1, *(1,) * (x.dim() - 2))


def input_channels(leaf: Any) -> int:
    return int(leaf.in_features if isinstance(leaf, nn.Linear) else leaf.in_channels)
