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
from edgeprune.prune.gram import Elimination, System, gram, solve_ridge
from edgeprune.prune.judge import Judge
from edgeprune.prune.patches import output_places, pack, refittable, rows_at, unpack

MAX_COLUMNS = 4700  # a larger Gram matrix costs more than it is worth: such consumers are cut without a refit
ROWS = 8192


@dataclass
class Consumer:
    """One layer that reads the group: ``columns`` (units, block) of its packed weight (p, outputs)."""

    path: str
    leaf: Any
    columns: Tensor
    packed: Tensor
    gram: Tensor | None  # (p, p) float64; None without data, or where it would be too large
    energy: float  # summed squared deviation of its outputs from their mean on the calibration rows


def find_consumers(judge: Judge | None, program: Any, group: ChannelGroup) -> list[Consumer] | None:
    """None when a reader of the group cannot be treated (a grouped or transposed convolution, or a shared layer)."""
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
        if not refittable(leaf) or getattr(leaf, "groups", 1) != 1:
            return None
        packed = pack(leaf).cpu()
        inputs = leaf.weight.shape[1]
        taps = (packed.shape[0] - 1) // inputs
        index = torch.from_numpy(slot.index)
        columns = (index[:, None, :] + inputs * torch.arange(taps)[None, :, None]).flatten(1)
        g, energy = None, float(packed[:-1].double().square().sum())
        if judge is not None and len(packed) <= MAX_COLUMNS:
            g, energy = _measure(judge, leaf, nodes, packed)
        found.append(Consumer(slot.target, leaf, columns, packed, g, max(energy, 1e-30)))
    return found or None


def _measure(judge: Judge, leaf: Any, nodes: Sequence[Any], packed: Tensor) -> tuple[Tensor, float]:
    total = torch.zeros(len(packed), len(packed), dtype=torch.float64)
    names = [judge.program.sources(n)[0].name for n in nodes]
    values = judge.values(names)
    for name in names:
        parts = values[name]
        where = judge.reference.where(output_places(leaf, parts[0]), max(2048, int(min(ROWS, 1e10 / len(packed) ** 2))))
        total += gram(rows_at(leaf, parts, where)).cpu()
    w = packed.double()
    second = (w * (total @ w)).sum()
    mean = (total[-1] @ w) / total[-1, -1]
    return total, float(second - total[-1, -1] * mean.square().sum())


def eliminate(consumers: Sequence[Consumer]) -> tuple[list[int], list[float], Elimination]:
    """Removal order of the units by the elimination kernel: (unit removed first, ...), cumulated summed relative
    residuals after each, the last unit left out."""
    systems = [System(c.gram, c.packed, c.energy, c.columns) for c in consumers if c.gram is not None]
    kernel = Elimination(systems, ridge=1e-3)
    units = len(consumers[0].columns)
    chunk = max(1, units // 64)
    removed: list[int] = []
    damage: list[float] = []
    while len(removed) < units - 1:
        increases = kernel.increases()
        count = min(chunk, units - 1 - len(removed))
        chosen = increases.topk(count, largest=False).indices
        before = kernel.damage
        kernel.drop(chosen.tolist())
        shares = increases[chosen]
        shares = shares / shares.sum() if float(shares.sum()) > 0 else torch.full_like(shares, 1 / count)
        for unit, share in zip(chosen.tolist(), shares.cumsum(0).tolist(), strict=True):
            removed.append(unit)
            damage.append(before + (kernel.damage - before) * share)
    return removed, damage, kernel


def without_units(consumers: Sequence[Consumer], units: Sequence[int], ridge: float = 1e-3) -> dict[str, nn.Module]:
    """Copies of the consumers with the columns of ``units`` at zero and, where there is a Gram matrix, the best
    weights for the rest."""
    modules: dict[str, nn.Module] = {}
    for c in consumers:
        gone = c.columns[torch.as_tensor(list(units), dtype=torch.int64)].reshape(-1)
        stays = torch.ones(len(c.packed), dtype=torch.bool)
        stays[gone] = False
        packed = c.packed.clone()
        packed[gone] = 0
        if c.gram is not None and len(gone):
            inside = c.gram[stays][:, stays]
            step = solve_ridge(inside, c.gram[stays][:, gone] @ c.packed[gone].double(), ridge)
            packed[stays] += step.float()
        weight, bias = unpack(c.leaf, packed)
        new = copy.deepcopy(modules.get(c.path, c.leaf))
        new.weight.data.copy_(weight)
        if new.bias is not None or c.gram is not None:
            new.bias = nn.Parameter(bias.to(new.weight.device), requires_grad=False)
        modules[c.path] = new
    return modules
