"""Parts of a graph that run under a context, put back in line.

``torch.export`` makes a sub-graph of what a model computes under ``torch.no_grad()`` or ``torch.autocast``. For a
network in single precision that is to be trained anew, neither context means anything.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

_SUBGRAPH_AT = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}  # position of the sub-graph's argument


def inline_contexts(module: fx.GraphModule) -> None:
    """Replace calls of such sub-graphs by what they hold, in place."""
    changed = True
    while changed:  # contexts nest
        changed = False
        for node in list(module.graph.nodes):
            position = _SUBGRAPH_AT.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
            if position is not None and len(node.args) > position:
                _inline(module, node, position)
                changed = True
    module.recompile()


def _inline(module: fx.GraphModule, node: fx.Node, position: int) -> None:
    body: Any = operator.attrgetter(str(node.args[position].target))(module)  # type: ignore[union-attr]
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(placeholders, node.args[position + 1 :], strict=True))
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                results = fx.node.map_arg(inner.args[0], lambda n: mapping[n])
            elif inner.op == "get_attr":
                path = f"{node.args[position].target}.{inner.target}"  # type: ignore[union-attr]
                mapping[inner] = module.graph.get_attr(path)
            elif inner.op != "placeholder":
                mapping[inner] = module.graph.node_copy(inner, lambda n: mapping[n])
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results)
    module.graph.erase_node(node)
