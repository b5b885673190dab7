"""ThiNet: keep the input channels that best reproduce the next layer's output.

Source: Luo et al., ICCV 2017 (greedy, then least-squares scales) and its TPAMI version (orthogonal matching pursuit).
With x_c what channel c adds to an output of the next layer (its taps summed), y = sum x_c is that output without bias.

    greedy    drop the channel that adds least to ||sum over the dropped of x||^2, again and again
    pursuit   keep the channel whose multiple explains most of what is left of y, then refit all kept ones
    cost      min over w of ||y - X_S w||^2, w one factor per kept channel: what is left after scaling the next layer

Shapes: x (samples, units), one output channel at one place of one image a sample; everything else is done on its Gram
matrix (units, units). Costs are what is left of ||y||^2 after scaling, as a share.
Deviations: all readers of a group are stacked, each with the same energy; y is what the group's own units give, so that
channels of other groups do not disturb; statistics come from the current network. The scales are never computed: their
residual alone shapes the curves, and the least-squares refit of whole readers that follows every cut (consumers.py,
compensate.py) subsumes them. Of more than 512 units, several are taken into the pursuit at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgeprune.graph.channels import ChannelGroup
from edgeprune.prune.consumers import Consumer, in_parts
from edgeprune.prune.gram import Selection, System
from edgeprune.prune.judge import Judge
from edgeprune.prune.patches import output_places, rows_at
from edgeprune.prune.select.curve import Curve, LocalCurve, along

PLACES = 8192  # sampled places of each reader
OUTPUTS = 4  # sampled output channels at each place
CHUNK = 256  # places at once


def thinet(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
        g = contribution_gram(judge, consumers)
        return curve_of(g, greedy(g))

    return curve


def thinet_omp(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
        g = contribution_gram(judge, consumers)
        return curve_of(g, pursuit(g))

    return curve


def contributions(rows: Tensor, consumer: Consumer, outputs: Tensor) -> Tensor:
    """(n, draws, units) float64: what each unit adds to the reader's outputs ``outputs[i]`` (n, draws) at place i; rows
    (n, p)."""
    weights = consumer.packed.T[:, consumer.columns]  # (outputs, units, block)
    return torch.einsum("iub,idub->idu", rows[:, consumer.columns], weights[outputs]).double()


def contribution_gram(judge: Judge, consumers: Sequence[Consumer]) -> Tensor:
    """(units, units) float64, products of contributions summed over samples, of readers that are each worth 1."""
    total = torch.zeros(len(consumers[0].columns), len(consumers[0].columns), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for c in consumers:
        own = torch.zeros_like(total)
        values = judge.values(c.sources)
        for name in c.sources:
            where = judge.reference.where(output_places(c.leaf, values[name][0]), PLACES)
            for rows in in_parts(rows_at(c.leaf, values[name], where))[c.part].cpu().split(CHUNK):
                outputs = torch.randint(c.packed.shape[1], (len(rows), OUTPUTS), generator=generator)
                x = contributions(rows, c, outputs).flatten(0, 1)
                own += x.T @ x
        total += own / own.sum().clamp_min(1e-30)  # 1^T G 1 = ||y||^2
    return total


def greedy(g: Tensor) -> list[int]:
    """Units, most important first. ``||r + x_c||^2 - ||r||^2 = 2 (G 1_T)_c + G_cc``, r the sum over the dropped T."""
    costs = g.diagonal().clone()
    removed: list[int] = []
    for _ in range(len(g)):
        unit = int(costs.argmin())
        removed.append(unit)
        costs += 2 * g[:, unit]
        costs[unit] = float("inf")
    return removed[::-1]


def pursuit(g: Tensor) -> list[int]:
    """Units, most important first: the largest ``(x_c . r)^2 / ||x_c||^2``, r the residual of all picked before."""
    norms = g.diagonal().clamp_min(float(g.diagonal().max()) * 1e-12 + 1e-300)
    return Selection([_system(g)]).order(lambda kernel: kernel.sides[0][:, 0].square() / norms)


def _system(g: Tensor) -> System:
    ones = torch.ones(len(g), 1, dtype=torch.float64)
    return System(g, ones, max(float(g.sum()), 1e-30), torch.arange(len(g))[:, None])


def curve_of(g: Tensor, order: Sequence[int]) -> LocalCurve:
    return along(_system(g), order)
