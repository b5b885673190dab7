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
    new = network.copy()
    if removed.any():
        survivors = Survivors(channels, removed)
        _cut_tensors(new.module, survivors)
        for node in new.module.graph.nodes:
            if node.op == "call_function":
                refit(node, survivors)
    result = rebuilt(new)
    if removed.any():
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


def _cut_tensors(module: fx.GraphModule, survivors: Survivors) -> None:
    """Cut every module and bare tensor. A tensor shared by several is cut once and stays shared."""
    done: dict[int, Any] = {}
    alive: list[torch.Tensor] = []  # ids are only unique among living objects
    seen: set[str] = set()

    def shrunk(tensor: torch.Tensor, selections: Mapping[int, np.ndarray | None]) -> torch.Tensor:
        if id(tensor) in done:
            return done[id(tensor)]
        with torch.no_grad():
            new = tensor.detach()
            for dim, stays in selections.items():
                if stays is not None and not stays.all():
                    new = new.index_select(dim, torch.from_numpy(np.flatnonzero(stays)).to(new.device))
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
        out = survivors.of(node)
        if node.op == "get_attr":
            if out is not None:
                owner, _, leaf = target.rpartition(".")
                tensor = operator.attrgetter(target)(module)
                setattr(module.get_submodule(owner), leaf, shrunk(tensor, {out[0]: out[1]}))
            continue
        into = survivors.of(node.args[0])
        if out is None and into is None:
            continue
        _cut_module(module.get_submodule(target), into[1] if into else None, out[1] if out else None, shrunk)


def _cut_module(leaf: Any, into: np.ndarray | None, out: np.ndarray | None, shrunk: Any) -> None:
    """into, out: bool per input and output channel, None where all stay."""

    def count(stays: np.ndarray | None, full: int) -> int:
        return full if stays is None else int(stays.sum())

    if isinstance(leaf, nn.Linear):
        selections: dict[int, np.ndarray | None] = {0: out, 1: into}
        leaf.in_features, leaf.out_features = count(into, leaf.in_features), count(out, leaf.out_features)
    elif isinstance(leaf, BATCH_NORMS):
        selections = {0: out}
        leaf.num_features = count(out, leaf.num_features)
        leaf.running_mean = shrunk(leaf.running_mean, selections)
        leaf.running_var = shrunk(leaf.running_var, selections)
    elif isinstance(leaf, (*CONVS, *CONV_TRANSPOSES)):
        transposed = isinstance(leaf, CONV_TRANSPOSES)
        outer, inner = (into, out) if transposed else (out, into)
        if is_depthwise(leaf):
            inner = None
            leaf.groups = count(into, leaf.groups)
        elif inner is not None:
            inner = inner[: len(inner) // leaf.groups]
        selections = {0: outer, 1: inner}
        leaf.in_channels, leaf.out_channels = count(into, leaf.in_channels), count(out, leaf.out_channels)
    else:
        return  # dropout
    leaf.weight = shrunk(leaf.weight, selections)
    if leaf.bias is not None:
        leaf.bias = shrunk(leaf.bias, {0: out})
