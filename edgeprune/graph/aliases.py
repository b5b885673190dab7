"""Writes that reach a tensor through another name: where turning in-place calls into plain ones would change results.

In ``y = x[:, :4]; y.mul_(2); return x`` the graph's ``mul_`` has no users, and yet it changes what is returned. Plain
in-place activations (``relu_`` whose result alone is used afterwards) are harmless.
"""

from __future__ import annotations

from typing import Any

from torch import fx


def has_hidden_writes(graph: fx.Graph) -> bool:
    """Whether some in-place call writes memory that is read later other than through the call's own result."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # node -> the node that owns its memory
    for node in graph.nodes:
        memory[node] = _owner(node, memory)
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node, owner in memory.items():
        sharing.setdefault(owner, []).append(node)
    for node in graph.nodes:
        for written in _written(node):
            after = _descendants(node)
            for other in sharing[memory[written]]:
                if other not in after and any(order[u] > order[node] and u is not node for u in other.users):
                    return True
    return False


def _arguments(node: fx.Node) -> list[tuple[Any, Any]]:
    """Schema argument and value, for the ATen calls of a graph."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    if schema is None:
        return []
    by_position = list(zip(schema.arguments, node.args, strict=False))
    return by_position + [(a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs]


def _owner(node: fx.Node, memory: dict[fx.Node, fx.Node]) -> fx.Node:
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node):
        return memory[node.args[0]]
    for argument, value in _arguments(node):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return memory[value]
    return node


def _written(node: fx.Node) -> list[fx.Node]:
    return [
        value
        for argument, value in _arguments(node)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node)
    ]


def _descendants(node: fx.Node) -> set[fx.Node]:
    """The node itself and the views made of its result."""
    found, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user not in found and any(a.alias_info is not None for a, _ in _arguments(user)):
                found.add(user)
                stack.append(user)
    return found
