"""CaP: the units whose loss hurts their readers least, after the readers' best weights for what is left.

Source: Xie et al. (2021), minimal information loss with closed-form reconstruction; the elimination kernel of gram.py.
Deviations: units are dropped one (or a small share) at a time and everything is refitted in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.graph.channels import ChannelGroup
from edgeprune.prune.consumers import Consumer, eliminate
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.curve import Curve, LocalCurve, from_removals
from edgeprune.prune.select.magnitude import magnitude


def cap(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    """Groups whose readers are all too wide for a Gram matrix go by magnitude."""
    by_weight = magnitude(judge, groups)

    def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
        if all(c.gram is None for c in consumers):
            return by_weight(group, consumers)
        removed, damage, _ = eliminate(consumers)
        return from_removals(group.size, removed, damage)

    return curve
