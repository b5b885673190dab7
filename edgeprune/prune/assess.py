"""What can be cut from a network and what each cut costs: the one call that a planning round makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgeprune.graph.blocks import Block
from edgeprune.graph.channels import Channels
from edgeprune.graph.network import Network
from edgeprune.plan.problem import Ranking
from edgeprune.prune.aims import Kept
from edgeprune.prune.depth import block_damage
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.cap import cap
from edgeprune.prune.select.curve import Selector
from edgeprune.prune.sensitivity import PROBES, rank_groups
from edgeprune.prune.trials import NetworkTrials

NOISE_IMAGES = 64


@dataclass(frozen=True, slots=True)
class Assessment:
    """rankings: group name -> Ranking; blocks: block name -> damage, in the unit of ``Ranking.damage``;
    divergence: the relative squared error that the network has already, against the original's outputs; trials: of
    moves on the judged network."""

    rankings: Mapping[str, Ranking]
    blocks: Mapping[str, float]
    divergence: float
    trials: NetworkTrials


def assess(
    original: Network,
    current: Network,
    channels: Channels,
    blocks: Sequence[Block],
    batches: Iterable[Any] | None,
    selector: Selector = cap,
    *,
    kept: Kept | None = None,
    labels: Tensor | None = None,
    widths: Mapping[str, Sequence[int]] | None = None,
    images: int = 256,
    progress: Callable[[float], None] | None = None,
    inner: Network | None = None,
) -> Assessment:
    """Judge every group and block of ``current`` by what it does to the original's outputs.

    channels, blocks: ``analyse`` and ``find_blocks`` of ``current``
    batches:  calibration inputs; None: random inputs give the scale of the damage and nothing else
    selector: which channels; without batches a data-free one
    kept:     as for ``compensate``
    labels:   (n,) classes of all images of ``batches``, in order; trials of final outputs use them where given
    widths:   group name -> the widths worth measuring exactly; groups not named are not judged (default: all groups at
              75, 50 and 25 %)
    progress: called with the share done, 0 to 1
    inner:    as for ``compensate``
    Raises DataError without any image.
    """
    inputs = [current.random_inputs(NOISE_IMAGES)] if batches is None else batches
    probes = dict.fromkeys((g.name for g in channels.groups), PROBES) if widths is None else widths
    trials = sum(map(len, probes.values())) + 3 * len(blocks)
    judge = Judge(original, current, inputs, images=images, trials=trials, kept=kept, labels=labels, inner=inner)
    say = progress or (lambda share: None)
    rankings = rank_groups(
        judge,
        channels,
        selector,
        data_free=batches is None,
        only=probes.keys(),
        widths=widths,
        progress=lambda done, total: say(0.6 * done / max(total, 1)),
    )
    damage = block_damage(judge, blocks, repair=batches is not None)
    say(1.0)
    return Assessment(rankings, damage, judge.divergence, NetworkTrials(judge, channels, blocks, rankings))
