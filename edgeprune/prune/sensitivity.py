"""Local curves become damage of the network's output, by measuring.

Every group is cut to a few widths, its readers get their best weights (consumers.py), and the calibration images run
through what follows: the growth of the output's squared error, relative to the output's variance, is the damage.
Between the probed widths the local curve is followed, scaled so that it passes through the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from edgeprune.graph.channels import ChannelGroup, Channels
from edgeprune.plan.problem import Ranking
from edgeprune.prune.consumers import Consumer, find_consumers, without_units
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.cap import cap
from edgeprune.prune.select.curve import LocalCurve, Selector

PROBES = (0.75, 0.5, 0.25)  # shares of a group that are kept
TINY = 1e-12


def rank_groups(
    judge: Judge,
    channels: Channels,
    selector: Selector = cap,
    *,
    data_free: bool = False,
    only: Collection[str] | None = None,
    widths: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Ranking]:
    """Rankings of the groups of the judge's network; groups that no treatable layer reads are left out.

    selector:  which channels (prune/select/)
    data_free: the judge's images mean nothing (noise): use no statistics of them but the scale of the damage
    widths:    group name -> widths to probe (default: 75, 50 and 25 %)
    """
    groups = [g for g in channels.groups if only is None or g.name in only]
    curve = selector(judge, groups)
    rankings: dict[str, Ranking] = {}
    for i, group in enumerate(groups):
        consumers = find_consumers(None if data_free else judge, judge.program, group)
        if consumers is not None:
            probes = widths.get(group.name) if widths else None
            rankings[group.name] = calibrate(judge, group, consumers, curve(group, consumers), probes)
        if progress is not None:
            progress(i + 1, len(groups))
    return rankings


def calibrate(
    judge: Judge,
    group: ChannelGroup,
    consumers: Sequence[Consumer],
    curve: LocalCurve,
    probes: Sequence[int] | None = None,
) -> Ranking:
    """The group's ranking with its damage measured at the probed widths."""
    size = group.size
    wanted = [round(share * size) for share in PROBES] if probes is None else probes
    measured: dict[int, float] = {size: 0.0}
    for width in sorted({min(max(int(w), 1), size) for w in wanted} - {size}, reverse=True):
        modules = without_units(consumers, curve.order[width:].tolist())
        measured[width] = max(judge.exchanged_error(modules) - judge.divergence, 0.0)
    return Ranking(curve.order, scaled(curve.cost, measured))


def scaled(cost: np.ndarray, measured: Mapping[int, float]) -> np.ndarray:
    """(size + 1,) damage that passes through the measured widths and follows ``cost`` between them: the ratio of damage
    to cost is interpolated along log cost and held beyond the outermost probes. Non-increasing, zero at full width."""
    size = len(cost) - 1
    widths = sorted((w for w in measured if w < size), reverse=True)
    if not widths:
        return np.zeros(size + 1)
    cost = np.maximum(np.asarray(cost, dtype=np.float64), 0.0)
    floor = max(float(cost.max()) * 1e-9, TINY)
    x = np.log(cost + floor)
    damage = np.maximum.accumulate([max(measured[w], TINY) for w in widths])
    at = np.array([x[w] for w in widths])
    ratio = np.log(damage) - at
    keep = np.concatenate([[True], np.diff(np.maximum.accumulate(at)) > 1e-9])
    full = x + np.interp(x, at[keep], ratio[keep])
    result = np.exp(full)
    for w, d in zip(widths, damage, strict=True):
        result[w] = d
    result[size] = 0.0
    return np.maximum.accumulate(result[::-1])[::-1]
