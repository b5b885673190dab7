"""Which channels must be cut together, and where they lie.

``analyse`` runs the network on labels (propagate.py) and sorts the units it finds into *groups*: units that occur at
the same places equally often are interchangeable, so a planner only needs to say how many of them stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgeprune.errors import UsageError
from edgeprune.graph.labels import Labels
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, Network
from edgeprune.graph.propagate import propagate
from edgeprune.graph.tracer import Tracer
from edgeprune.plan.problem import Axis


@dataclass(frozen=True, slots=True)
class Slot:
    """One place where the units of a group lie.

    target: path of a module, or of a bare parameter or buffer
    role:   "out" a producer's output channels; "in" a consumer's input channels; "channel" per-channel modules (batch
            norm, depthwise convolution), numbered by their output; "param" one dim of a bare tensor
    dim:    the tensor's dim for "param"; else 0 for out and channel, 1 for in: the module's channel axis
    index:  (size, multiplicity) int64, positions of each unit along that axis, in the module's full numbering
    """

    target: str
    role: str
    dim: int
    index: np.ndarray


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """``size`` interchangeable units, named after their first producer; unit u lies at ``slot.index[u]``."""

    name: str
    size: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Channels:
    """
    groups:      those that can be pruned
    unknown_ops: operators that are not understood; what they touch is frozen
    labels:      node name -> int64 of the node's output shape at batch 1 (stride 0 along all dims but one), the global
                 unit at each element; -1 is frozen
    offsets:     the global id of unit u of group i is ``offsets[i] + u``
    """

    groups: tuple[ChannelGroup, ...]
    unknown_ops: tuple[str, ...]
    labels: Mapping[str, torch.Tensor]
    offsets: tuple[int, ...]

    def group(self, name: str) -> ChannelGroup:
        """Raises UsageError for an unknown name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise UsageError(f"no channel group is named {name!r}; `edgeprune inspect` lists them")

    def vector(self, node_name: str) -> tuple[int, np.ndarray] | None:
        """The axis along which a node's labels vary and the global unit at each position; None if it is frozen."""
        labels = self.labels.get(node_name)
        if labels is None:
            return None
        for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
            if stride != 0 and size > 1:
                line = labels[tuple(slice(None) if d == axis else 0 for d in range(labels.dim()))]
                return axis, line.numpy()
        return None

    def axis(self, node_name: str, dim: int) -> Axis:
        """The size of a node's output along ``dim`` as a function of the group widths."""
        shape = self.labels[node_name].shape
        found = self.vector(node_name)
        if found is None or found[0] != dim % len(shape):
            return Axis((), int(shape[dim]))
        ids = found[1]
        owner = np.searchsorted(np.asarray(self.offsets), ids[ids >= 0], side="right") - 1
        groups, counts = np.unique(owner, return_counts=True)
        terms = tuple((int(g), int(c) // self.groups[g].size) for g, c in zip(groups, counts, strict=True))
        return Axis(terms, int((ids < 0).sum()))

    def removed(self, keep: Mapping[str, Sequence[int]]) -> np.ndarray:
        """(units + 1,) bool: which global units go when ``keep`` stays; the last entry (index -1, frozen) is False.

        Raises UsageError for an unknown group, an index out of range, a repeated one, or an empty selection.
        """
        total = sum(g.size for g in self.groups)
        gone = np.zeros(total + 1, dtype=bool)
        for name, units in keep.items():
            group = self.group(name)
            offset = self.offsets[self.groups.index(group)]
            chosen = np.asarray(list(units), dtype=np.int64)
            if chosen.size == 0:
                raise UsageError(f"group {name!r} would keep no channel; at least 1 of {group.size} must stay")
            if chosen.min() < 0 or chosen.max() >= group.size or len(np.unique(chosen)) != chosen.size:
                raise UsageError(f"group {name!r} has units 0..{group.size - 1}, each at most once; got {list(units)}")
            gone[offset : offset + group.size] = True
            gone[offset + chosen] = False
        return gone


def analyse(network: Network) -> Channels:
    """Find the channel groups of a canonical network."""
    found = propagate(network)
    units = found.units
    sources = _sources(network, found)
    roots = [units.find(ids) for _, _, _, ids in sources]
    groups = _grouped(sources, roots, _signatures(found))

    where = np.full(units.count, -1, dtype=np.int64)
    offsets, total = [], 0
    for _, members in groups:
        where[members] = np.arange(total, total + len(members))
        offsets.append(total)
        total += len(members)
    slots: list[list[Slot]] = [[] for _ in groups]
    for (target, role, dim, _), ids in zip(sources, roots, strict=True):
        for g, index in _positions(where[ids], offsets, groups):
            slots[g].append(Slot(target, role, dim, index))
    return Channels(
        groups=tuple(ChannelGroup(name, len(m), tuple(slots[g])) for g, (name, m) in enumerate(groups)),
        unknown_ops=tuple(found.unknown),
        labels=_final_labels(found, where),
        offsets=tuple(offsets),
    )


Source = tuple[str, str, int, np.ndarray]  # target, role, dim, the unit at each position


def _sources(network: Network, found: Tracer) -> list[Source]:
    """Every place where channels lie in a module or bare tensor, in graph order."""
    sources: list[Source] = []
    seen: set[str] = set()
    for node in network.module.graph.nodes:
        target = str(node.target)
        if node.op not in ("call_module", "get_attr") or target in seen or node.name not in found.labels:
            continue
        seen.add(target)
        out = found.labels[node.name]
        if node.op == "get_attr":
            if out.axis is not None and out.ids is not None:
                sources.append((target, "param", out.axis, out.ids))
            continue
        module = network.module.get_submodule(target)
        x = found.labels[node.args[0].name]
        if isinstance(module, BATCH_NORMS):
            sources.append((target, "channel", 0, out.vector(1)))
        elif isinstance(module, nn.Linear):
            last = len(x.shape) - 1
            sources.append((target, "in", 1, x.vector(last)))
            sources.append((target, "out", 0, out.vector(last)))
        elif isinstance(module, (*CONVS, *CONV_TRANSPOSES)):
            if is_depthwise(module):
                sources.append((target, "channel", 0, out.vector(1)))
            else:
                sources.append((target, "in", 1, x.vector(1)))
                sources.append((target, "out", 0, out.vector(1)))
    return sources


def is_depthwise(module: nn.Module) -> bool:
    """One group per input channel: output channel i * m + j depends on input channel i alone."""
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == module.in_channels


def _signatures(found: Tracer) -> dict[int, bytes]:
    """Unit -> fingerprint of how often it occurs in which node's output. Two units of equal fingerprint are
    interchangeable: wherever one lies, the other lies too. (Sums of random 64-bit numbers, two of them.)"""
    rng = np.random.default_rng(0)
    sums = np.zeros((2, found.units.count), dtype=np.uint64)
    for labels in found.labels.values():
        weights = rng.integers(0, 2**64, size=2, dtype=np.uint64)
        if labels.ids is not None:
            roots, counts = np.unique(found.units.find(labels.ids), return_counts=True)
            sums[:, roots] += weights[:, None] * counts.astype(np.uint64)
    present = np.flatnonzero(sums.any(axis=0))
    columns = np.ascontiguousarray(sums[:, present].T)
    return {int(root): row.tobytes() for root, row in zip(present, columns, strict=True) if root != 0}


def _grouped(
    sources: list[Source], roots: list[np.ndarray], signatures: dict[int, bytes]
) -> list[tuple[str, np.ndarray]]:
    """Groups in graph order of their first producer: name and members, in that producer's channel order."""
    members: dict[bytes, dict[int, None]] = {}
    names: dict[bytes, str] = {}
    producers_first = sorted(range(len(sources)), key=lambda i: sources[i][1] != "out")
    for i in producers_first:
        for root in roots[i].tolist():
            signature = signatures.get(root)
            if signature is not None:
                names.setdefault(signature, sources[i][0])
                members.setdefault(signature, {})[root] = None
    taken: dict[str, int] = {}
    groups = []
    for signature, units in members.items():
        if len(units) < 2:
            continue  # a lone unit can never go: something would be left without channels
        name = names[signature]
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
        groups.append((unique, np.fromiter(units, dtype=np.int64)))
    return groups


def _positions(
    ids: np.ndarray, offsets: Sequence[int], groups: list[tuple[str, np.ndarray]]
) -> list[tuple[int, np.ndarray]]:
    """The groups that lie in a vector of global units, each with its (size, multiplicity) positions."""
    order = np.argsort(ids, kind="stable")
    order = order[ids[order] >= 0]
    owner = np.searchsorted(np.asarray(offsets), ids[order], side="right") - 1
    return [(int(g), order[owner == g].reshape(len(groups[g][1]), -1)) for g in np.unique(owner)]


def _final_labels(found: Tracer, where: np.ndarray) -> dict[str, torch.Tensor]:
    final = {}
    for name, labels in found.labels.items():
        ids = where[found.units.find(labels.ids)] if labels.ids is not None else None
        if ids is None or (ids < 0).all():
            final[name] = torch.full((), -1, dtype=torch.int64).expand(labels.shape)
        else:
            final[name] = Labels(labels.shape, labels.axis, ids).tensor()
    return final
