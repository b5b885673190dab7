"""What is known while a network is run on labels, and the few things every rule does with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx

from edgeprune.graph.labels import Labels, Units, along, frozen
from edgeprune.graph.network import Network, shapes


class Tracer:
    """
    env:     node -> ``Labels``, a tuple of them, or a number
    units:   the union-find that joins the labels
    unknown: names of operators that are in no row of the table
    batched: nodes that depend on an input, so that dim 0 is the batch
    shapes:  node name -> shape at batch 1
    """

    def __init__(self, network: Network):
        self.network = network
        self.units = Units()
        self.env: Any = {}
        self.unknown: dict[str, None] = {}
        self.batched: set[fx.Node] = set()
        self.shapes = shapes(network)
        self._parameters: dict[tuple[int, int], np.ndarray] = {}

    @property
    def labels(self) -> dict[str, Labels]:
        """Node name -> labels, of every node that gives one tensor."""
        return {node.name: value for node, value in self.env.items() if isinstance(value, Labels)}

    def tensors(self, node: fx.Node) -> list[Labels]:
        value = self.env[node]
        values = value if isinstance(value, (tuple, list)) else [value]
        return [v for v in values if isinstance(v, Labels)]

    def evaluated(self, value: Any) -> Any:
        """Arguments with nodes replaced: labels by tensors of integers, sizes by numbers."""

        def one(node: fx.Node) -> Any:
            v = self.env[node]
            return v.tensor() if isinstance(v, Labels) else v

        return fx.node.map_arg(value, one)

    def out(self, node: fx.Node, axis: int | None, ids: np.ndarray | None) -> Labels:
        shape = self.shapes[node.name]
        return frozen(shape) if axis is None or ids is None else along(self.units, shape, axis, ids)

    def freeze(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            for labels in self.tensors(node):
                if labels.ids is not None:
                    self.units.freeze(labels.ids)

    def refuse(self, node: fx.Node) -> Labels | None:
        """What no cut respects: everything the node touches stays whole. (Of an operator with several outputs the
        ``getitem`` nodes ask again, each for its own shape.)"""
        self.freeze(node.all_input_nodes)
        shape = self.shapes.get(node.name)
        return frozen(shape) if shape is not None else None

    def share(self, tensor: torch.Tensor | None, dim: int, ids: np.ndarray) -> None:
        """``ids`` lie along ``dim`` of ``tensor``; wherever the same tensor is used again, they are the same units."""
        if tensor is not None:
            known = self._parameters.setdefault((id(tensor), dim), ids)
            self.units.unite(known, ids)

    def couple(self, ids: np.ndarray, groups: int) -> None:
        """The same offset in every group goes together, so that all groups lose equally many."""
        rows = ids.reshape(groups, -1)
        self.units.unite(rows, rows[0])
