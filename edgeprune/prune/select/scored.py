"""Scores that are there already, of the channels of a network that a learner trained: most important first.

The network is cut in rounds, and groups may change their names when blocks go; so scores are kept with the layers that
make the channels, in the numbering of the trained network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from edgeprune.graph.channels import ChannelGroup, Slot, analyse
from edgeprune.graph.network import Network
from edgeprune.prune.consumers import Consumer
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.curve import Curve, LocalCurve, Selector, from_scores
from edgeprune.prune.select.magnitude import reading


def scored(network: Network, scores: Mapping[str, np.ndarray]) -> Selector:
    """The selector that orders the channels of ``network``, and of what is cut out of it, by ``scores``: group name ->
    (units,), of any scale and not negative. Groups without them are ordered by the weights that read them."""
    known: dict[str, dict[int, float]] = {}  # layer that makes channels -> its output channel -> score
    for group in analyse(network).groups:
        for slot in _makers(group) if group.name in scores else ():
            for positions, score in zip(slot.index.tolist(), scores[group.name].tolist(), strict=True):
                known.setdefault(slot.target, {}).update(dict.fromkeys(positions, score))

    def selector(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
        def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
            found = (_of(slot, known.get(slot.target, {}), judge) for slot in _makers(group))
            values = next((v for v in found if v is not None), None)
            return from_scores(reading(consumers) if values is None else values)

        return curve

    return selector


def _of(slot: Slot, places: Mapping[int, float], judge: Judge) -> Tensor | None:
    """(units,) scores of the units that lie in a slot of the judge's network, None where one has none."""
    kept = None if judge.kept is None else judge.kept.get(slot.target)
    first = slot.index[:, 0].tolist()
    values = [places.get(i if kept is None else int(kept[i])) for i in first]
    scores = [v for v in values if v is not None]
    return torch.tensor(scores, dtype=torch.float64) if len(scores) == len(values) else None


def _makers(group: ChannelGroup) -> list[Slot]:
    return [slot for slot in group.slots if slot.role in ("out", "channel")]
