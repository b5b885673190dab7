"""CaP: the units whose loss hurts their readers least, after the readers' best weights for what is left.

Source: Xie et al. (2021), minimal information loss with closed-form reconstruction. With Sigma the second moments of
what a reader sees, dropping the columns T of its weight W and refitting the others costs
``tr(W_T (Sigma_TT - Sigma_TS Sigma_SS^-1 Sigma_ST) W_T^T)``: the pivots of gram.py, all taps of a channel as one block
and a column of ones, so that the bias absorbs means.
Shapes: curve.py's; costs are residuals relative to the variance of the readers' outputs, summed over readers.
Deviations: units are dropped one (of many, a small share) at a time, and everything is refitted in between; a ridge of
1e-3 stands for the images that the selection does not see.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.graph.channels import ChannelGroup
from edgeprune.prune.consumers import RIDGE, Consumer
from edgeprune.prune.gram import Elimination, System
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.curve import Curve, LocalCurve, from_removals
from edgeprune.prune.select.magnitude import magnitude_in

ROUNDS = 64


def cap(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    """Groups whose readers are all too wide for a Gram matrix go by those readers' weights."""
    by_weight = magnitude_in(judge, groups)

    def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
        found = systems(consumers)
        if not found:
            return by_weight(group, consumers)
        return from_removals(group.size, *Elimination(found, RIDGE).order(ROUNDS))

    return curve


def systems(consumers: Sequence[Consumer]) -> list[System]:
    """The readers' least-squares problems, of those that have a Gram matrix."""
    return [System(c.gram, c.packed, c.energy, c.columns, bias=True) for c in consumers if c.gram is not None]
