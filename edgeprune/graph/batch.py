"""Freeing the batch of a graph that was exported with a fixed one.

``torch.export.export(model, (x,))`` bakes the batch size of ``x`` into the sizes of ``view`` and ``expand``. Those
sizes are made relative again, and the result is only believed if a batch of two gives what its samples give alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.network import Network, shapes

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
_FACTORIES = {aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_ones.default}
_TOLERANCE = 1e-4  # relative, between a batch of two and two batches of one


def free_batch(network: Network, baked: int) -> None:
    """Make the batch dynamic, in place. baked: the batch size that the graph was exported with.

    Raises UnsupportedModelError when the graph depends on its batch in another way.
    """
    if _runs_at(network, 3):
        return
    graph = network.module.graph
    first = next(n for n in graph.nodes if n.op == "placeholder")
    original = shapes(network, batch=baked)
    size: fx.Node | None = None
    depends: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder" or any(a in depends for a in node.all_input_nodes):
            depends.add(node)
        place = _sizes_at(node)
        if place is None or original.get(node.name, (None,))[0] != baked:
            continue
        sizes = list(node.args[place])
        if node.target in _VIEWS and node.args[0] not in depends:
            continue
        if sizes[0] != baked:
            continue
        if node.target in _VIEWS and -1 not in sizes:
            sizes[0] = -1
        else:
            if size is None:
                with graph.inserting_after(first):
                    size = graph.call_function(aten.sym_size.int, (first, 0))
            sizes[0] = size
        node.args = (*node.args[:place], sizes, *node.args[place + 1 :])
    network.module.recompile()
    if not _runs_at(network, 3) or not samples_are_independent(network):
        raise UnsupportedModelError(
            f"{network.origin}: exported with a fixed batch of {baked} that cannot be freed; export it again with "
            "dynamic_shapes=({0: torch.export.Dim.AUTO},)"
        )


def _sizes_at(node: fx.Node) -> int | None:
    """The position of the argument that lists sizes."""
    place = 1 if node.target in _VIEWS or "new_" in str(node.target) else 0
    if node.target not in _VIEWS and node.target not in _FACTORIES:
        return None
    value: Any = node.args[place] if len(node.args) > place else None
    return place if isinstance(value, (list, tuple)) and value else None


def _runs_at(network: Network, batch: int) -> bool:
    try:
        one, many = shapes(network, batch=1), shapes(network, batch=batch)
    except Exception:  # sizes that do not fit raise whatever the operator at hand raises
        return False
    output = next(n for n in network.module.graph.nodes if n.op == "output")
    return all(
        many[n.name] == (one[n.name][0] * batch, *one[n.name][1:])
        for n in output.all_input_nodes
        if n.name in many and len(many[n.name]) > 0
    )


def samples_are_independent(network: Network) -> bool:
    """Whether a batch of two random samples gives what they give alone."""
    inputs = network.random_inputs(batch=2)
    with torch.no_grad():
        together = _tuple(network.module(*inputs))
        alone = [_tuple(network.module(*(x[i : i + 1] for x in inputs))) for i in range(2)]
    return all(
        torch.allclose(t, torch.cat([a[i] for a in alone]), rtol=_TOLERANCE, atol=_TOLERANCE * float(t.abs().max()))
        for i, t in enumerate(together)
    )


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
