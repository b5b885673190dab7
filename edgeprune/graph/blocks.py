"""Residual branches that can be taken out whole.

A *block* is an addition one of whose operands comes from nodes that feed nothing else (its exclusive cone), with at
least one convolution or linear among them. Without the branch the other operand takes the sum's place; its shape is
the same, so the network stays well formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from edgeprune.graph.network import CONV_TRANSPOSES, CONVS, Network, shapes
from edgeprune.graph.ops import arguments

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Block:
    """A removable residual branch.

    name:     common path of the modules in it ("layer1.0"), or its first weighted module where that is not unique
    join:     name of the addition
    branch:   name of the node whose operand is dropped
    shortcut: name of the node that takes the addition's place (of consecutive blocks, the join of the one before)
    nodes:    names of the nodes that die with it, the join included
    """

    name: str
    join: str
    branch: str
    shortcut: str
    nodes: frozenset[str]


def find_blocks(network: Network) -> tuple[Block, ...]:
    """All removable blocks in graph order; of nested ones the innermost."""
    graph = network.module.graph
    size = shapes(network)
    order = {node: i for i, node in enumerate(graph.nodes)}
    batched = _from_inputs(graph)
    found: list[tuple[fx.Node, fx.Node, fx.Node, set[fx.Node]]] = []
    for join in graph.nodes:
        candidates = []
        for branch, shortcut in _operands(join):
            if size.get(shortcut.name) != size.get(join.name) or shortcut not in batched:
                continue
            cone = _exclusive_cone(branch, join, order)
            weighted = sum(_is_weighted(network, n) for n in cone)
            if weighted:
                candidates.append((weighted, branch, shortcut, cone))
        if candidates:
            _, branch, shortcut, cone = max(candidates, key=lambda c: c[0])
            found.append((join, branch, shortcut, cone))
    innermost: list[tuple[fx.Node, fx.Node, fx.Node, set[fx.Node]]] = []
    used: set[fx.Node] = set()
    for item in sorted(found, key=lambda f: len(f[3])):
        if not used & (item[3] | {item[0]}):
            innermost.append(item)
            used |= item[3] | {item[0]}
    innermost.sort(key=lambda f: order[f[0]])
    names = _names(network, [sorted(cone, key=order.__getitem__) for _, _, _, cone in innermost])
    return tuple(
        Block(name, join.name, branch.name, shortcut.name, frozenset(n.name for n in cone | {join}))
        for name, (join, branch, shortcut, cone) in zip(names, innermost, strict=True)
    )


def _operands(join: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(branch, shortcut) both ways round, for a plain addition of two different tensors."""
    if join.op != "call_function" or join.target is not aten.add.Tensor:
        return []
    args = arguments(join)
    a, b = args["self"], args["other"]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b or args["alpha"] != 1:
        return []
    return [(a, b), (b, a)]


def _from_inputs(graph: fx.Graph) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _exclusive_cone(branch: fx.Node, join: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """Ancestors of ``branch``, itself included, all of whose uses lead to ``join`` through ``branch``."""
    cone: set[fx.Node] = set()
    waiting = {branch}
    while waiting:
        node = max(waiting, key=order.__getitem__)  # all its users were looked at
        waiting.discard(node)
        if node.op == "placeholder":
            continue
        if all(user in cone or (node is branch and user is join) for user in node.users):
            cone.add(node)
            waiting.update(node.all_input_nodes)
    return cone


def _is_weighted(network: Network, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        network.module.get_submodule(str(node.target)), (*CONVS, *CONV_TRANSPOSES, nn.Linear)
    )


def _names(network: Network, cones: list[list[fx.Node]]) -> list[str]:
    prefixes, firsts = [], []
    for cone in cones:
        paths = [str(n.target).split(".") for n in cone if _is_weighted(network, n)]
        common = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        prefixes.append(".".join(common))
        firsts.append(".".join(paths[0]))
    names: list[str] = []
    for prefix, first in zip(prefixes, firsts, strict=True):
        name = prefix if prefix and prefixes.count(prefix) == 1 else first
        unique, k = name, 2
        while unique in names:
            unique, k = f"{name}#{k}", k + 1
        names.append(unique)
    return names
