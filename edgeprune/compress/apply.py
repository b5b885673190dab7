"""Applying plans one after another, and saying in the end what became of every channel of the original.

Each plan speaks of the network it was made for. A *shadow* copy of the original, whose weights are their own channel
numbers, goes through the same surgery, so that the surviving channels can be read off it in the original's numbering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from edgeprune.errors import UsageError
from edgeprune.graph.blocks import Block, find_blocks
from edgeprune.graph.channels import ChannelGroup, Channels, analyse
from edgeprune.graph.network import CONV_TRANSPOSES, CONVS, Network
from edgeprune.graph.surgery import cut, remove
from edgeprune.plan.problem import Plan, Ranking

_STRIDE = 1 << 20  # in the shadow, a weight is output channel * _STRIDE + input channel, exact in float64


@dataclass(frozen=True, slots=True)
class Progress:
    """A network on its way: what it is now, its shadow, and the names of the blocks it has lost so far."""

    network: Network
    shadow: Network
    removed: tuple[str, ...] = ()


def begin(network: Network) -> Progress:
    return Progress(network.copy(), _shadow(network))


def advance(progress: Progress, plan: Plan, rankings: Mapping[str, Ranking]) -> Progress:
    """Cut and remove what the plan says; ``progress.network`` stays as it was."""
    channels, blocks = analyse(progress.network), find_blocks(progress.network)
    keep = {name: rankings[name].keep(width) for name, width in plan.widths.items() if name in rankings}
    gone = [b for b in blocks if b.name in plan.removed]
    return Progress(
        apply(progress.network, channels, keep, gone),
        apply(progress.shadow, channels, keep, gone),
        (*progress.removed, *plan.removed),
    )


def apply(network: Network, channels: Channels, keep: Mapping[str, tuple[int, ...]], gone: list[Block]) -> Network:
    return remove(cut(network, channels, keep), gone)


def apply_plan(network: Network, plan: Plan) -> Network:
    """Apply a finished plan (with ``keep``) to a fresh copy of the network it was made for.

    Raises UsageError when the plan names a group or block the network does not have.
    """
    channels, blocks = analyse(network), find_blocks(network)
    unknown = [g for g in plan.keep if all(g != h.name for h in channels.groups)]
    unknown += [b for b in plan.removed if all(b != c.name for c in blocks)]
    if unknown:
        raise UsageError(
            f"the plan names {', '.join(unknown[:5])}, which {network.origin} does not have; it was made for another "
            "network: run `edgeprune inspect` to see this one's groups and blocks"
        )
    return apply(network, channels, dict(plan.keep), [b for b in blocks if b.name in plan.removed])


def finished_plan(original: Network, progress: Progress, plan: Plan) -> Plan:
    """The plan in terms of the original: for every group of it, the units that survived.

    ``plan`` lends its prediction. Groups that lie in removed blocks, and those not narrowed, are left out.
    """
    survivors = _survivors(progress.shadow)
    keep: dict[str, tuple[int, ...]] = {}
    for group in analyse(original).groups:
        units = _kept_units(group, survivors)
        if units is not None and len(units) < group.size:
            keep[group.name] = units
    return replace(plan, widths={g: len(k) for g, k in keep.items()}, keep=keep, removed=progress.removed)


def _shadow(network: Network) -> Network:
    shadow = network.copy()
    shadow.module.double()
    for module in shadow.module.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() >= 2:
            rows = torch.arange(weight.shape[0], dtype=torch.float64) * _STRIDE
            columns = torch.arange(weight.shape[1], dtype=torch.float64)
            numbers = (rows[:, None] + columns).reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
            weight.data = numbers.expand_as(weight).clone()
    return shadow


def _survivors(shadow: Network) -> dict[tuple[str, str], set[int]]:
    """(module path, role) -> channel numbers of the original that are still there."""
    result: dict[tuple[str, str], set[int]] = {}
    for path, module in shadow.module.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
            continue
        rows = {int(v) // _STRIDE for v in weight.reshape(weight.shape[0], -1)[:, 0].tolist()}
        columns = {int(v) % _STRIDE for v in weight.movedim(1, 0).reshape(weight.shape[1], -1)[:, 0].tolist()}
        transposed = isinstance(module, CONV_TRANSPOSES)
        result[path, "out"], result[path, "in"] = (columns, rows) if transposed else (rows, columns)
        if isinstance(module, CONVS) and module.groups > 1:
            del result[path, "in"]  # numbered within a group only
            result[path, "channel"] = rows
        if transposed and module.groups > 1:  # type: ignore[union-attr]
            del result[path, "out"]
            result[path, "channel"] = rows
    return result


def _kept_units(group: ChannelGroup, survivors: Mapping[tuple[str, str], set[int]]) -> tuple[int, ...] | None:
    for slot in group.slots:
        alive = survivors.get((slot.target, slot.role))
        if alive is not None and slot.role in ("out", "in", "channel"):
            return tuple(u for u in range(group.size) if int(slot.index[u, 0]) in alive)
    return None
