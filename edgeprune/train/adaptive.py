"""Learning layers and channels together: layer factors and channel scales under one penalty that latency prices.

Source: adaptive channel and layer pruning, of which only the idea was at hand: how many channels and how many layers go
is learnt, not given. So the pieces are ResConv's layer factors (resconv.py) and network slimming's scales
(channel_scales.py), in one objective: ``loss + alpha * (sum over layers of price * |lam| + sum over units of
price * scale)``.
Shapes: as there.

One alpha rises over the run and drives both. A price is the milliseconds that a layer, or one unit of a group, saves,
in units of what all layers and all whole groups save on average. A part dies when alpha exceeds what the loss loses
with it per millisecond, whether it is a layer or a channel; so which proportion of each goes comes out by itself. The
penalty ends when the network is predicted within the budget without its dead layers, and with the next candidate width
of what is alive in each group. What is dead stays dead, and the rest recovers.

Deviations
    The penalty on a unit is a small part of that on a layer, and so is what a step takes from it. Therefore factors
    learn at a lower rate and scales at a higher one, loss and penalty alike, so that none die first for dying faster.
    A layer's batch norm is no longer held channel by channel, since its channels may go, but as a whole.
    Batch norms keep their running statistics during the search (channel_scales.py says why).
    At the end dead units are read by nobody, and have the scales from before again, so that where a plan keeps some of
    them further training can wake them. The network then is judged as any other: what is dead costs nothing there and
    ranks last, and the planner takes it first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.channels import analyse
from edgeprune.graph.network import Network
from edgeprune.graph.resconv import absorb_factors, prepare
from edgeprune.graph.resconv_mix import unmix
from edgeprune.train.ablation import silence
from edgeprune.train.channel_scales import TINY, ChannelScales
from edgeprune.train.config import TrainConfig
from edgeprune.train.finetune import finetune
from edgeprune.train.learner import Learned, Learner, Lesson, Price
from edgeprune.train.resconv import LayerFactors, Settings, with_factors

SETTINGS = Settings(first=1e-2, last=1.0, most=1.0)
FASTEST = 8.0


class Adaptive(LayerFactors):
    """Drives the factors and the scales of a student towards zero.

    widths: as in ``Lesson``; the others as for ``LayerFactors``
    """

    def __init__(
        self,
        network: Network,
        student: Network,
        widths: Mapping[str, tuple[int, ...]],
        latency_ms: Price,
        budget_ms: float,
        config: TrainConfig,
        loss: float = 1.0,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(network, student, latency_ms, budget_ms, config, loss, settings or SETTINGS)
        self.enough_ms = budget_ms
        self.channels = ChannelScales(network, student, widths, latency_ms)
        wholes = [*self.saved, *(group.saved_ms * group.size for group in self.channels.groups)]
        mean_ms = sum(wholes) / max(len(wholes), 1)
        if mean_ms > 0:
            self.prices = [saved / mean_ms for saved in self.saved]
            for group in self.channels.groups:
                group.price = group.saved_ms / mean_ms
        layers, units = self._rates()
        self.paced = [(lam, layers) for lam in self.lams] + [(w, units) for w in self.channels.weights()]
        self.layer_rate, self.channels.rate = layers, units
        self._look()

    def key(self) -> str:
        return f"adaptive {super().key()} {[group.name for group in self.channels.groups]}"

    def start(self, steps: int) -> None:
        super().start(steps)
        self.channels.start()

    def after_step(self, step: int, x: Tensor) -> None:
        if not self.enough:
            for (tensor, rate), before in zip(self.paced, self.before, strict=True):
                tensor.copy_(torch.lerp(before.to(tensor), tensor, rate))
        super().after_step(step, x)
        self._look()

    def finish(self) -> None:
        super().finish()
        self.channels.silence()

    def hold(self) -> None:
        super().hold()
        if not self.enough:
            for lam in self.lams:
                lam.clamp_(max=1.0)

    def hold_leaves(self) -> None:
        for leaf, scale in zip(self.leaves, self.scales, strict=True):
            leaf.weight.mul_((scale.norm() / leaf.weight.norm().clamp_min(TINY)).clamp_max(1.0))
        if not self.enough:
            self.channels.hold()

    def shrink(self, pull: float) -> bool:
        layers, channels = super().shrink(self.layer_rate * pull), self.channels.shrink(pull)
        return layers or channels

    def predicted_ms(self) -> float:
        return self.latency_ms(self.channels.widths(), self.removed())

    def state(self) -> dict[str, Any]:
        return {**super().state(), "channels": self.channels.state()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.channels.load(state["channels"])
        self._look()  # the student's weights are those of the same step

    def _look(self) -> None:
        self.before = [tensor.detach().clone() for tensor, _ in self.paced]

    def _rates(self) -> tuple[float, float]:
        """Of learning, for factors and for scales, relative to all other weights: such that a typical factor and a
        typical scale would shrink equally fast."""
        units = [group.price / group.reference**2 for group in self.channels.groups if group.price > 0]
        layers = [price for price in self.prices if price > 0]
        if not units or not layers:
            return 1.0, 1.0
        ratio = float(np.median(layers) / np.median(units)) ** 0.5
        return max(1 / ratio, 1 / FASTEST), min(ratio, FASTEST)


def adaptive(lesson: Lesson) -> Learned:
    """Train a copy of the network with its factors and scales under the penalty. It ranks nothing itself: it is to be
    judged as any network is.

    Raises UnsupportedModelError when there is nothing that can go, and what ``finetune`` raises.
    """
    config = replace(lesson.config, batch_norm="frozen")
    network, student, loss = with_factors(lesson)
    hook = Adaptive(network, student, lesson.widths, lesson.latency_ms, lesson.budget_ms, config, loss)
    groups = hook.channels.groups
    if not hook.factors and all(group.floor == group.size for group in groups):
        raise UnsupportedModelError(
            f"{lesson.network.origin}: no layer of this network can be removed, and no group of channels has both a "
            "scale and a narrower width worth having; `edgeprune inspect` lists its groups"
        )
    history = finetune(
        student.module, lesson.teacher.copy().module, lesson.data, config, lesson.checkpoint, lesson.progress,
        hooks=[hook],
    )  # fmt: skip
    hook.channels.wake()
    learned = absorb_factors(unmix(student, network))
    silence(learned, analyse(learned), hook.channels.alive())
    dead, units = sum(int((~g.alive).sum()) for g in groups), sum(g.size for g in groups)
    history.notes.append(
        f"adaptive: {len(hook.dead)} of {len(hook.factors)} layers and {dead} of {units} units of channels came to "
        f"zero, predicted {hook.predicted_ms():.4g} ms without them, {lesson.budget_ms:.4g} ms asked"
    )
    # not told as ``removed``: without its layers the network from before would still have its dead channels
    return Learned(learned, {}, {}, history)


ADAPTIVE = Learner(adaptive, prepare)
