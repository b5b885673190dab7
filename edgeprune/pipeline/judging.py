"""The two things a planning round asks of the selection methods: what every cut would cost, and the repair after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from edgeprune.graph.network import Network
from edgeprune.pipeline.apply import State, apply_recipe
from edgeprune.pipeline.problem import Widths
from edgeprune.pipeline.shrink import Judgement
from edgeprune.pipeline.spans import Anatomy
from edgeprune.prune.aims import trace_channels
from edgeprune.prune.assess import assess
from edgeprune.prune.compensate import compensate
from edgeprune.prune.select.curve import Selector

Callback = Callable[[float, float, str], None]


PROBES = 3  # widths of a group that are measured; between them its local curve is followed


class Judge:
    """Judges and repairs cuts of ``original`` by its responses to ``batches`` ((n, ...) inputs). Without batches
    selection looks at the weights, and nothing is repaired. ``labels``: the classes of all inputs, in order; planners
    that try moves at the network's end go by them where there are any. ``start``: what plans are made for where that is
    not the original itself but a network of like outputs with more layers."""

    def __init__(
        self,
        original: Network,
        selector: Selector,
        batches: Sequence[torch.Tensor],
        progress: Callback,
        labels: torch.Tensor | None = None,
        start: Network | None = None,
    ):
        self.original, self.selector, self.batches, self.progress = original, selector, batches, progress
        self.labels = labels
        self.inner, self.start = start, start or original

    def judge(self, state: State, anatomy: Anatomy, candidates: Sequence[Widths]) -> Judgement:
        found = assess(
            self.original,
            state.network,
            anatomy.channels,
            anatomy.blocks,
            self.batches or None,
            self.selector,
            kept=self._kept(state),
            labels=self.labels,
            widths={
                group.name: _probes(widths)
                for group, widths in zip(anatomy.channels.groups, candidates, strict=True)
                if len(widths) > 1
            },
            images=min(256, max(64, sum(map(len, self.batches)) // 4)),
            progress=lambda share: self.progress(share, 1.0, f"round {_round(state)}: judging channels and blocks"),
            inner=self.inner,
        )
        return Judgement(found.rankings, found.blocks, found.trials, found.divergence)

    def repair(self, state: State) -> Network:
        if not self.batches:
            return state.network
        self.progress(0.0, 1.0, f"round {_round(state) - 1}: repairing")
        return compensate(self.original, state.network, self.batches, kept=self._kept(state), inner=self.inner)

    def _kept(self, state: State) -> dict[str, torch.Tensor]:
        return trace_channels(self.start, lambda network: apply_recipe(network, state.recipe))


def _round(state: State) -> int:
    return len(state.recipe.steps) + 1


def _probes(candidates: Widths) -> list[int]:
    """A few of the widths that a plan may choose, spread over them; the full one needs no measuring."""
    below = candidates[:-1]
    picks = np.unique(np.linspace(0, len(below) - 1, PROBES + 1).round().astype(int)[1:])
    return [below[i] for i in picks]
