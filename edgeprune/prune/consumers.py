"""The layers that read a channel group, as least-squares systems on calibration inputs.

To hold some units of a group at zero is to zero their columns in every layer that reads them; the best weights for the
rest follow from that layer's Gram matrix (gram.py). So a cut can be tried, best weights included, by exchanging
consumers only, without surgery. (Group and layer norms between see the zeros: there it is an approximation.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.graph.channels import ChannelGroup
from edgeprune.prune.gram import gram, penalties, solver
from edgeprune.prune.judge import Judge
from edgeprune.prune.patches import output_places, pack, refittable, rows_at, unpack

MAX_COLUMNS = 4700  # a larger Gram matrix costs more than it is worth: such consumers are cut without a refit
ROWS = 8192
RIDGE = 1e-3  # of trial refits and of the selections that foresee them


@dataclass
class Consumer:
    """One layer that reads the group, or one of a grouped convolution's parts: ``columns`` (units, block) of its packed
    weight (p, outputs)."""

    path: str
    leaf: Any
    part: int
    sources: tuple[str, ...]  # names of the nodes it reads, one a call
    columns: Tensor
    packed: Tensor
    gram: Tensor | None  # (p, p) float64; None without data, or where it would be too large
    energy: float  # summed squared deviation of its outputs from their mean on the calibration rows


def find_consumers(judge: Judge | None, program: Any, group: ChannelGroup) -> list[Consumer] | None:
    """None when a reader of the group cannot be treated: a transposed convolution, or a grouped one that does not read
    every unit in each of its parts."""
    calls: dict[str, list[Any]] = {}
    for node in program.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found: list[Consumer] = []
    for slot in group.slots:
        if slot.role != "in" or slot.target not in calls:
            continue
        nodes = calls[slot.target]
        leaf = program.leaf(nodes[0])
        columns = _columns(leaf, torch.from_numpy(slot.index)) if refittable(leaf) else None
        if columns is None:
            return None
        packed = in_parts(pack(leaf).cpu())
        sources = tuple(program.sources(n)[0].name for n in nodes)
        grams: Sequence[Tensor | None] = [None] * len(packed)
        if judge is not None and packed.shape[1] <= MAX_COLUMNS:
            grams = _measure(judge, leaf, sources, packed.shape[1])
        for i, (g, own) in enumerate(zip(grams, packed, strict=True)):
            found.append(Consumer(slot.target, leaf, i, sources, columns[i], own, g, max(_energy(g, own), 1e-30)))
    return found or None


def in_parts(packed: Tensor) -> Tensor:
    """(parts, ..., ...) of the packed weight or the rows of a layer, one part where it is not grouped."""
    return packed if packed.dim() == 3 else packed[None]


def _columns(leaf: Any, index: Tensor) -> Tensor | None:
    """(parts, units, block) from the units' input channels (units, multiplicity); None if they differ between parts."""
    groups, inputs = int(getattr(leaf, "groups", 1)), leaf.weight.shape[1]
    if index.shape[1] % groups:
        return None
    index = index.sort(1).values.reshape(len(index), groups, -1).transpose(0, 1)
    if bool((index // inputs != torch.arange(groups)[:, None, None]).any()):
        return None
    taps = leaf.weight[0, 0].numel()
    return (index[:, :, None] % inputs + inputs * torch.arange(taps)[:, None]).flatten(2)


def _measure(judge: Judge, leaf: Any, names: Sequence[str], p: int) -> list[Tensor]:
    """A Gram matrix (p, p) of each part's inputs."""
    total: list[Tensor] = []
    values = judge.values(names)
    for name in names:
        where = judge.reference.where(output_places(leaf, values[name][0]), max(2048, int(min(ROWS, 1e10 / p**2))))
        found = [gram(rows).cpu() for rows in in_parts(rows_at(leaf, values[name], where))]
        total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return total


def _energy(g: Tensor | None, packed: Tensor) -> float:
    w = packed.double()
    if g is None:
        return float(w[:-1].square().sum())
    mean = (g[-1] @ w) / g[-1, -1]
    return float((w * (g @ w)).sum() - g[-1, -1] * mean.square().sum())


def without_units(consumers: Sequence[Consumer], units: Sequence[int], ridge: float = RIDGE) -> dict[str, nn.Module]:
    """Copies of the consumers with the columns of ``units`` at zero and, where there is a Gram matrix, the best
    weights for the rest."""
    modules: dict[str, nn.Module] = {}
    for c in consumers:
        gone = c.columns[torch.as_tensor(list(units), dtype=torch.int64)].reshape(-1)
        stays = torch.ones(len(c.packed), dtype=torch.bool)
        stays[gone] = False
        stays[:-1] &= c.packed[:-1].any(1)  # columns at zero belong to units that are gone already
        packed = c.packed.clone()
        packed[gone] = 0
        if c.gram is not None and len(gone):
            solve = solver(c.gram[stays][:, stays], penalties(c.gram, ridge)[stays])
            packed[stays] += solve(c.gram[stays][:, gone] @ c.packed[gone].double()).float()
        new = copy.deepcopy(modules.get(c.path, c.leaf))
        whole = pack(new)
        in_parts(whole)[c.part].copy_(packed)
        weight, bias = unpack(new, whole)
        new.weight.data.copy_(weight)
        if new.bias is not None or c.gram is not None:
            new.bias = nn.Parameter(bias.to(new.weight.device), requires_grad=False)
        modules[c.path] = new
    return modules
