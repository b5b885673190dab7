"""Every layer becomes removable: a factor on its output, and a shortcut past it.

Source: ResConv layer pruning (Xu et al., 2020), ``y = phi(lam * BN(conv(x)) + m * x)``: lam is the layer factor that an
L1 penalty drives to zero, m says how much of the input the shortcut carries.
Shapes: x and y are (N, C, ...); lam and m are single numbers.
Deviations: the equation is a reconstruction, only the abstract was at hand. A residual branch that can be removed whole
gets a factor at its end, and no further shortcut inside.

``instrument`` writes this into the graph as plain nodes and starts at lam = 1, m = 0, where the network computes what
it did before. find_blocks then sees every such layer as a block; without it ``phi(m * x)`` is left, which folding
collapses where that is exact (fold_scale.py), as it folds the layers that stay into plain convolutions
(fold_residual.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from edgeprune.graph.blocks import Block, find_blocks
from edgeprune.graph.fold_residual import refusal
from edgeprune.graph.lift import place
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, DROPOUTS, Network
from edgeprune.graph.surgery import rebuilt

aten = torch.ops.aten
_MUL, _ADD = aten.mul.Tensor, aten.add.Tensor
_WEIGHTED = (*CONVS, *CONV_TRANSPOSES, nn.Linear)
_AFFINE = (*_WEIGHTED, *BATCH_NORMS)

LARGEST_BRANCH = (
    6  # weighted layers; what has more is a network beside a long shortcut, and its layers count one by one
)


@dataclass(frozen=True, slots=True)
class Factor:
    """The layer factor of one removable block.

    block: name of the block (find_blocks)
    lam:   path of the factor, a parameter of one element
    m:     path of the shortcut's factor, None where the shortcut carries its input as it is
    leaf:  path of the batch norm or weighted layer whose output the factor multiplies, None where it is another node's
    """

    block: str
    lam: str
    m: str | None
    leaf: str | None


def instrument(network: Network) -> Network:
    """A network with the same outputs and a factor on everything that can be removed; the given one stays as it is."""
    new = network.copy()
    graph = new.module.graph
    nodes = {n.name: n for n in graph.nodes}
    blocks = _branches(new)
    known = {factor.block for factor in factors(new)}
    for call, end, reason in list(_layers(new, blocks)):
        if reason is not None:
            continue
        path, readers = f"{call.target}_res", list(end.users)
        with graph.inserting_before(call):
            kept = _times(new, call.args[0], f"{path}.m", 0.0)
        with graph.inserting_before(end.next):
            scaled = _times(new, end, f"{path}.lam", 1.0)
            joined = graph.call_function(_ADD, (scaled, kept))
        for reader in readers:
            reader.replace_input_with(end, joined)
    for block in blocks:
        if block.name not in known:
            branch, join = nodes[block.branch], nodes[block.join]
            with graph.inserting_before(join):
                scaled = _times(new, branch, f"{block.name.replace('#', '_')}_res.lam", 1.0)
            join.replace_input_with(branch, scaled)
    return rebuilt(new)


def refusals(network: Network) -> dict[str, str]:
    """Path of every convolution that ``instrument`` gives no shortcut of its own -> why."""
    return {str(call.target): reason for call, _, reason in _layers(network, _branches(network)) if reason is not None}


def factors(network: Network) -> tuple[Factor, ...]:
    """The layer factors that a network has, by ``instrument`` or by its own making, in graph order of the blocks."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    found = []
    for block in find_blocks(network):
        scaled = _scaled(network, nodes[block.branch])
        if scaled is not None:
            shortcut = _scaled(network, nodes[block.shortcut])
            leaf = str(scaled[0].target) if _is_a(network, scaled[0], _AFFINE) else None
            found.append(Factor(block.name, scaled[1], shortcut[1] if shortcut else None, leaf))
    return tuple(found)


def absorb_factors(network: Network) -> Network:
    """The same function, every lam taken into the batch norm or convolution that it multiplies; groups and blocks keep
    their names. Shortcuts stay, and so does the factor of a branch that ends in something else."""
    new = network.copy()
    graph = new.module.graph
    nodes = {n.name: n for n in graph.nodes}
    blocks, calls = {b.name: b for b in find_blocks(new)}, new.modules_called()
    for factor in factors(new):
        scaled = nodes[blocks[factor.block].branch]
        value = next(n for n in scaled.all_input_nodes if n.op != "get_attr")
        if _is_a(new, value, _AFFINE) and len(value.users) == 1 and len(calls[str(value.target)]) == 1:
            lam = operator.attrgetter(factor.lam)(new.module).item()
            _multiply(new.module.get_submodule(str(value.target)), lam)
            scaled.replace_all_uses_with(value)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return rebuilt(new)


def prepare(network: Network) -> Network:
    """``instrument`` without the factors: the same outputs, and a shortcut past every layer that can be removed."""
    return absorb_factors(instrument(network))


def with_open_shortcuts(network: Network) -> Network:
    """A copy in which shortcuts past removable blocks that carry nothing (m = 0) carry their input (m = 1); the network
    itself if there are none."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    scaled = [_scaled(network, nodes[block.shortcut]) for block in find_blocks(network)]
    shut = [s[1] for s in scaled if s is not None and operator.attrgetter(s[1])(network.module).item() == 0.0]
    if not shut:
        return network
    new = network.copy()
    with torch.no_grad():
        for path in shut:
            operator.attrgetter(path)(new.module).fill_(1.0)
    return new


def _multiply(leaf: Any, factor: float) -> None:
    """Scale what a layer gives. A batch norm without parameters gets some."""
    with torch.no_grad():
        if leaf.weight is None:
            leaf.weight = nn.Parameter(torch.ones_like(leaf.running_var))
            leaf.bias, leaf.affine = nn.Parameter(torch.zeros_like(leaf.running_var)), True
        leaf.weight.mul_(factor)
        if leaf.bias is not None:
            leaf.bias.mul_(factor)


def _branches(network: Network) -> tuple[Block, ...]:
    """The residual branches that are removed whole."""
    nodes = {n.name: n for n in network.module.graph.nodes}
    blocks = find_blocks(network)
    return tuple(b for b in blocks if sum(_is_a(network, nodes[n], _WEIGHTED) for n in b.nodes) <= LARGEST_BRANCH)


def _layers(network: Network, blocks: Sequence[Block]) -> Iterator[tuple[fx.Node, fx.Node, str | None]]:
    """(call, the node whose value a factor multiplies, why there can be none) of every convolution, in graph order."""
    owner = {name: block.name for block in blocks for name in block.nodes}
    calls = network.modules_called()
    shared = _shared_weights(network)
    for path, (call, *more) in calls.items():
        leaf: Any = network.module.get_submodule(path)
        if not isinstance(leaf, (*CONVS, *CONV_TRANSPOSES)):
            continue
        end = _end(network, call, calls)
        reason = refusal(leaf)
        if reason is not None:
            pass
        elif call.name in owner:
            reason = f"lies in the residual branch {owner[call.name]}, which is removed whole"
        elif more:
            reason = "is called more than once"
        elif id(leaf.weight) in shared:
            reason = "shares its weight with another layer"
        elif call.args[0].op == "placeholder":  # type: ignore[union-attr]
            reason = "reads the network's input"
        elif end is None:
            reason = "is read by a batch norm and by others"  # a factor in front of a batch norm is cancelled by it
        yield call, end or call, reason


def _end(network: Network, call: fx.Node, calls: dict[str, list[fx.Node]]) -> fx.Node | None:
    """The batch norm behind a convolution, or its own call where there is none; None if that one is not its alone."""
    end = call
    while len(end.users) == 1 and _is_a(network, only := next(iter(end.users)), DROPOUTS):
        end = only
    norms = [user for user in end.users if _is_a(network, user, BATCH_NORMS)]
    if not norms:
        return call
    alone = len(end.users) == 1 and len(calls[str(norms[0].target)]) == 1
    return norms[0] if alone else None


def _shared_weights(network: Network) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for path in network.modules_called():
        weight = getattr(network.module.get_submodule(path), "weight", None)
        if weight is not None:
            (shared if id(weight) in seen else seen).add(id(weight))
    return shared


def _scaled(network: Network, node: fx.Node) -> tuple[fx.Node, str] | None:
    """(value, path of the parameter of one element) if ``node`` multiplies these two."""
    if node.op != "call_function" or node.target is not _MUL:
        return None
    values = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    held = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    if len(values) != 1 or len(held) != 1:
        return None
    tensor = operator.attrgetter(str(held[0].target))(network.module)
    return (values[0], str(held[0].target)) if isinstance(tensor, nn.Parameter) and tensor.numel() == 1 else None


def _times(network: Network, value: Any, path: str, start: float) -> fx.Node:
    """A multiplication with a new parameter, at the graph's point of insertion."""
    like = next((p for p in network.module.parameters() if p.is_floating_point()), torch.zeros(()))
    place(network.module, path, nn.Parameter(torch.full((), start, dtype=like.dtype, device=like.device)))
    graph = network.module.graph
    return graph.call_function(_MUL, (value, graph.get_attr(path)))


def _is_a(network: Network, node: fx.Node, kinds: tuple[type, ...]) -> bool:
    return node.op == "call_module" and isinstance(network.module.get_submodule(str(node.target)), kinds)
