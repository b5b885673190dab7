"""What a selection method is, and what it says about one group.

A method is called once a round with the judge, where it may run the whole network; the function it returns is called
once for every group. Its curves are comparable within a group only: sensitivity.py measures them in the network's
output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from edgeprune.graph.channels import ChannelGroup
from edgeprune.prune.consumers import Consumer
from edgeprune.prune.gram import System, residuals
from edgeprune.prune.judge import Judge


@dataclass(frozen=True, slots=True)
class LocalCurve:
    """order: (size,) most important first. cost: (size + 1,) of keeping ``order[:w]``; cost[size] == 0, non-increasing;
    its unit is the method's own."""

    order: np.ndarray
    cost: np.ndarray


Curve = Callable[[ChannelGroup, Sequence[Consumer]], LocalCurve]
Selector = Callable[[Judge, Sequence[ChannelGroup]], Curve]


def from_scores(scores: Tensor) -> LocalCurve:
    """Units by descending score; dropping several costs the sum of their scores."""
    values = scores.detach().double().cpu().numpy()
    order = np.argsort(-values, kind="stable")
    cost = np.concatenate([np.cumsum(values[order][::-1])[::-1], [0.0]])
    return LocalCurve(order, cost)


def from_removals(size: int, removed: Sequence[int], damage: Sequence[float]) -> LocalCurve:
    """From a removal order of all units but one and the damage after each; keeping nothing costs as much again as
    keeping one."""
    last = next(u for u in range(size) if u not in set(removed))
    order = np.array([last, *reversed(list(removed))])
    grown = np.maximum.accumulate(np.asarray([0.0, *damage]))
    cost = np.concatenate([[2 * grown[-1]], grown[::-1]])
    return LocalCurve(order, cost)


def along(system: System, order: Sequence[int]) -> LocalCurve:
    """From an order chosen beforehand: what the best fit with the first units leaves of the system's energy."""
    return LocalCurve(np.asarray(order), residuals(system, order).numpy())
