"""Cut channels out of a network, and take residual branches out of it. Both give a new network; the old one stays."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.blocks import Block
from edgeprune.graph.channels import Channels, is_depthwise
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, Network, check, shapes
from edgeprune.graph.refit import Survivors, refit


def cut(network: Network, channels: Channels, keep: Mapping[str, Sequence[int]]) -> Network:
    """A network of the kept channels only. Groups that are not named keep everything.

    channels: ``analyse(network)`` of this very network
    keep:     group name -> unit indices that stay (order does not matter)
    Node names and module paths stay. Raises UsageError for a bad ``keep`` (see Channels.removed), and
    UnsupportedModelError if the cut network's shapes are not those the labels promise.
    """
    removed = channels.removed(keep)
    return resized(network, channels, np.where(removed, 0, 1))


def resized(network: Network, channels: Channels, copies: np.ndarray) -> Network:
    """A network that has each unit as often as ``copies`` says, (units + 1,) int64 by global unit, the last entry 1.

    Raises UnsupportedModelError if its shapes are not those the labels promise.
    """
    new = network.copy()
    survivors = Survivors(channels, copies)
    changed = bool((copies != 1).any())
    if changed:
        _resize_tensors(new.module, survivors)
        for node in new.module.graph.nodes:
            if node.op == "call_function":
                refit(node, survivors)
    result = rebuilt(new)
    if changed:
        _verify(result, survivors)
    return result


def remove(network: Network, blocks: Sequence[Block]) -> Network:
    """A network without the given blocks (``find_blocks``): each join gives way to its shortcut, and what nobody uses
    any more is deleted. Names of what stays do not change."""
    new = network.copy()
    graph = new.module.graph
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    by_name = {node.name: node for node in graph.nodes}
    for block in sorted(blocks, key=lambda b: order[b.join]):
        join, branch = by_name[block.join], by_name[block.branch]
        (shortcut,) = [n for n in join.all_input_nodes if n is not branch]
        join.replace_all_uses_with(shortcut)
        graph.erase_node(join)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return rebuilt(new)


def rebuilt(network: Network) -> Network:
    """The same graph on a module that holds only what the graph uses."""
    module = fx.GraphModule(network.module, network.module.graph)
    module.train(network.module.training)
    module._edgeprune_canonical = True  # type: ignore[assignment]
    result = Network(module, network.input_shapes, network.origin)
    check(result)
    return result


def _verify(network: Network, survivors: Survivors) -> None:
    actual = shapes(network)
    for node in network.module.graph.nodes:
        if node.op not in ("output", "placeholder") and node.name in actual:
            expected = survivors.size(node)
            if actual[node.name] != expected:
                raise UnsupportedModelError(
                    f"{network.origin}: cutting channels at {node.name} gave shape {actual[node.name]}, expected "
                    f"{expected}; please report this network, and keep its channels whole meanwhile"
                )


def _resize_tensors(module: fx.GraphModule, survivors: Survivors) -> None:
    """Resize every module and bare tensor. A tensor shared by several is resized once and stays shared."""
    done: dict[int, Any] = {}
    alive: list[torch.Tensor] = []  # ids are only unique among living objects
    seen: set[str] = set()

    def chosen(tensor: torch.Tensor, indices: Mapping[int, np.ndarray | None]) -> torch.Tensor:
        if id(tensor) in done:
            return done[id(tensor)]
        with torch.no_grad():
            new = tensor.detach()
            for dim, index in indices.items():
                if index is not None and not np.array_equal(index, np.arange(new.shape[dim])):
                    new = new.index_select(dim, torch.from_numpy(index).to(new.device))
        if new.shape == tensor.shape:
            new = tensor
        elif isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        alive.append(tensor)
        done[id(tensor)] = done[id(new)] = new
        alive.append(new)
        return new

    for node in module.graph.nodes:
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or target in seen:
            continue
        seen.add(target)
        out = survivors.index(node)
        if node.op == "get_attr":
            if out is not None:
                owner, _, leaf = target.rpartition(".")
                tensor = operator.attrgetter(target)(module)
                axis, _ = survivors.of(node) or (0, None)
                setattr(module.get_submodule(owner), leaf, chosen(tensor, {axis: out}))
            continue
        into = survivors.index(node.args[0])
        if out is not None or into is not None:
            _resize_module(module.get_submodule(target), into, out, chosen)


def _resize_module(leaf: Any, into: np.ndarray | None, out: np.ndarray | None, chosen: Any) -> None:
    """into, out: the old position of each new input and output channel, None where nothing changes."""

    def count(index: np.ndarray | None, full: int) -> int:
        return full if index is None else len(index)

    if isinstance(leaf, nn.Linear):
        indices: dict[int, np.ndarray | None] = {0: out, 1: into}
        leaf.in_features, leaf.out_features = count(into, leaf.in_features), count(out, leaf.out_features)
    elif isinstance(leaf, BATCH_NORMS):
        indices = {0: out}
        leaf.num_features = count(out, leaf.num_features)
        leaf.running_mean = chosen(leaf.running_mean, indices)
        leaf.running_var = chosen(leaf.running_var, indices)
    elif isinstance(leaf, (*CONVS, *CONV_TRANSPOSES)):
        transposed = isinstance(leaf, CONV_TRANSPOSES)
        outer, inner = (into, out) if transposed else (out, into)
        if is_depthwise(leaf):
            inner = None
            leaf.groups = count(into, leaf.groups)
        elif inner is not None:
            inner = inner[: len(inner) // leaf.groups]  # all groups of a convolution lose and gain alike
        indices = {0: outer, 1: inner}
        leaf.in_channels, leaf.out_channels = count(into, leaf.in_channels), count(out, leaf.out_channels)
    else:
        return  # dropout
    leaf.weight = chosen(leaf.weight, indices)
    if leaf.bias is not None:
        leaf.bias = chosen(leaf.bias, {0: out})


@torch.no_grad()
def zero_inputs(leaf: Any, positions: Sequence[int]) -> None:
    """Zero, in place, the weights with which a convolution or linear layer reads these input channels."""
    if not len(positions):
        return
    if isinstance(leaf, CONV_TRANSPOSES):
        leaf.weight[list(positions)] = 0
        return
    share = leaf.weight.shape[1]  # inputs of one group of a convolution
    outputs = leaf.weight.shape[0] // getattr(leaf, "groups", 1)
    for position in positions:
        block = position // share
        leaf.weight[block * outputs : (block + 1) * outputs, position % share] = 0
