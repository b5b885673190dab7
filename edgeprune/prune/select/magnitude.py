"""Magnitude: what a unit weighs. Needs no data.

Source: filter norms (Li et al., 2017).

    magnitude      the filters that make a unit times the weights that read it, so that rescaling one against the other
                   changes nothing; batch norm's scale and depthwise layers between count too
    magnitude_in   the weights that read it, each reader with the same energy

Deviations: squared norms of both sides, or of the other side; the paper takes the absolute sum of the filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgeprune.graph.channels import ChannelGroup
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES
from edgeprune.prune.consumers import Consumer
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program
from edgeprune.prune.select.curve import Curve, LocalCurve, from_scores


def magnitude(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    program = judge.program

    def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
        return from_scores(weights(program, group))

    return curve


def magnitude_in(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    return lambda group, consumers: from_scores(reading(consumers))


def reading(consumers: Sequence[Consumer]) -> Tensor:
    """(units,) squared norms of the weights that read each unit, of all readers worth 1 each."""
    own = [c.packed.double()[c.columns].square().sum((1, 2)) for c in consumers]
    return torch.stack([norms / norms.sum().clamp_min(1e-30) for norms in own]).sum(0)


def weights(program: Program, group: ChannelGroup) -> Tensor:
    """(units,) squared norm of a unit's filters (batch norm's scale included) times that of the weights reading it."""
    own = torch.zeros(group.size, dtype=torch.float64)
    read = torch.zeros(group.size, dtype=torch.float64)
    scale = torch.ones(group.size, dtype=torch.float64)
    for slot in group.slots:
        index = torch.from_numpy(slot.index)
        if slot.role == "param":
            continue
        leaf: Any = program.module(slot.target)
        if isinstance(leaf, BATCH_NORMS) and leaf.running_var is not None:
            gain = leaf.weight.detach().double().square() / (leaf.running_var.double() + leaf.eps)
            scale = scale * gain[index].mean(1).cpu()
            continue
        transposed = isinstance(leaf, CONV_TRANSPOSES)
        weight: Tensor = leaf.weight.detach().double()
        if transposed:
            weight = weight.transpose(0, 1)
        if slot.role == "in" and getattr(leaf, "groups", 1) == 1:
            read += weight.transpose(0, 1).flatten(1).square().sum(1).cpu()[index].sum(1)
        elif slot.role == "out" and getattr(leaf, "groups", 1) == 1:
            own += weight.flatten(1).square().sum(1).cpu()[index].sum(1)
        elif slot.role == "channel" and not transposed:
            scale = scale * weight.flatten(1).square().sum(1).cpu()[index].sum(1)
    own, read = (torch.ones_like(v) if float(v.sum()) == 0 else v for v in (own, read))
    return own * scale * read
