"""Learning which layers a network can do without: layer factors under an L1 penalty that latency prices.

Source: ResConv layer pruning (Xu et al., 2020): train with ``loss + alpha * sum |lam_l|``, delete layers whose factor
died. Latency version: ``alpha_l = alpha * L_l / mean(L)``, L_l the milliseconds that removing layer l saves.
Shapes: every lam and m is one number; graph/resconv.py puts them into the network.

The penalty is taken as a proximal step after the optimiser's, ``lam <- sign(lam) * max(|lam| - lr * alpha_l, 0)``,
since gradient steps on |lam| never reach zero; lr is the step that a constant gradient makes with momentum. What a
factor multiplies keeps its scale (a batch norm its weights, a convolution without one the norm of its own), or that
would grow as the factor shrinks.

Deviations
    While a plain layer is learnt, its shortcut carries ``(1 - lam) * m * x`` (graph/resconv_mix.py), where m starts at
    the scale of the layer and does not fall below it; otherwise batch norms hide the factors of plain networks.
    alpha rises over the run, geometrically, until the layers at zero save enough latency; then the penalty ends, these
    layers stay at zero, and the others recover. A layer dies when alpha exceeds what the loss loses with it, so layers
    go in the order of what they are worth per millisecond, and there is no alpha to choose: it ends at the loss of a
    network that knows nothing. The source has one alpha.
    Layers bring a part of the way to the budget, at most half of what all of them take; narrower layers bring the rest.
    Where training ends, every layer left over is judged by what its removal does to the output, as with all methods; so
    a factor that is small without being zero says nothing by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.network import Network
from edgeprune.graph.resconv import absorb_factors, factors, instrument, prepare, refusals
from edgeprune.graph.resconv_mix import carried, mix, unmix
from edgeprune.train.config import TrainConfig
from edgeprune.train.finetune import finetune
from edgeprune.train.hooks import Hook
from edgeprune.train.learner import Learned, Learner, Lesson, Price, loss_of_constant
from edgeprune.train.schedule import Schedule

MEASURED = 256  # images that tell how much a layer gives and its shortcut would carry
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Settings:
    """
    first, last: alpha of a layer of average price at the first step, and from ``full`` of the run on, in units of the
        loss of a network that always gives the same answer
    part:        of the milliseconds from the present latency to the budget that removed layers bring
    most:        share of the latency of all removable layers that is taken
    """

    first: float = 1e-3
    last: float = 2.0
    full: float = 0.8
    part: float = 0.6
    most: float = 0.5


class LayerFactors(Hook):
    """Drives the factors of a student towards zero.

    network:    what ``instrument`` made
    student:    the network that is trained: ``network``, mixed (graph/resconv_mix.py)
    latency_ms: as in ``Lesson``
    budget_ms:  the latency to reach; the penalty ends where the layers at zero have brought their part of the way
    loss:       of a network that always gives the same answer
    """

    def __init__(
        self,
        network: Network,
        student: Network,
        latency_ms: Price,
        budget_ms: float,
        config: TrainConfig,
        loss: float = 1.0,
        settings: Settings | None = None,
    ) -> None:
        self.config, self.settings, self.loss = config, settings or Settings(), loss
        self.factors = factors(network)
        module = student.module
        self.lams = [module.get_parameter(f.lam) for f in self.factors]
        self.ms = [None if f.m is None else module.get_parameter(f.m) for f in self.factors]
        self.floors = [0.0 if m is None else m.item() for m in self.ms]
        leaves: list[Any] = [module.get_submodule(f.leaf) for f in self.factors if f.leaf is not None]
        self.leaves = [leaf for leaf in leaves if leaf.weight is not None]
        full_ms = latency_ms({}, ())
        self.saved = [max(full_ms - latency_ms({}, (f.block,)), 0.0) for f in self.factors]
        mean = sum(self.saved) / max(len(self.saved), 1)
        self.prices = [s / mean if mean > 0 else 1.0 for s in self.saved]  # of an average layer: 1
        self.latency_ms = latency_ms
        removable_ms = full_ms - latency_ms({}, tuple(f.block for f in self.factors))
        way_ms = self.settings.part * max(full_ms - budget_ms, 0.0)
        self.enough_ms = full_ms - min(way_ms, self.settings.most * removable_ms)
        self.enough = False
        self.dead: list[int] = []
        self.scales: list[Tensor] = []
        self.steps = 1

    def removed(self) -> tuple[str, ...]:
        """Blocks whose factor is zero."""
        return tuple(self.factors[i].block for i in self.dead)

    def key(self) -> str:
        return f"resconv {self.settings} {[f.lam for f in self.factors]}"

    def start(self, steps: int) -> None:
        self.steps = steps
        self.scales = [_scale(leaf).clone() for leaf in self.leaves]

    def shorten(self, step: int, steps: int) -> None:
        self.steps = steps

    def after_step(self, step: int, x: Tensor) -> None:
        self.hold()
        if self.enough:
            self.finish()
        elif self.shrink(self._rate(step) * self.alpha(step)):
            self.enough = self.predicted_ms() <= self.enough_ms

    def finish(self) -> None:
        for i in self.dead:
            self.lams[i].zero_()

    def hold(self) -> None:
        """Undo what the optimiser did to get around the penalty."""
        self.hold_leaves()
        for lam, m, floor in zip(self.lams, self.ms, self.floors, strict=True):
            if m is not None:
                m.clamp_(min=floor)
                lam.clamp_(0.0, 1.0)

    def hold_leaves(self) -> None:
        for leaf, scale in zip(self.leaves, self.scales, strict=True):
            leaf.weight.copy_(scale if scale.dim() else leaf.weight * (scale / _scale(leaf).clamp_min(TINY)))

    def shrink(self, pull: float) -> bool:
        """The proximal step of the penalty, ``pull`` for what has a price of 1; whether others are at zero now."""
        for lam, price in zip(self.lams, self.prices, strict=True):
            lam.copy_(shrunk(lam, pull * price))
        before, self.dead = self.dead, [i for i, lam in enumerate(self.lams) if lam.item() == 0.0]
        return self.dead != before

    def predicted_ms(self) -> float:
        """Without what is at zero."""
        return self.latency_ms({}, self.removed())

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "enough": self.enough,
            "enough_share": self.enough_ms / self.latency_ms({}, ()),  # another process prices a little differently
            "dead": list(self.dead),
            "prices": list(self.prices),
            "loss": self.loss,
            "scales": [scale.clone() for scale in self.scales],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.steps, self.enough = state["steps"], state["enough"]
        self.enough_ms = state["enough_share"] * self.latency_ms({}, ())
        self.dead, self.prices, self.loss = list(state["dead"]), list(state["prices"]), state["loss"]
        self.scales = [scale.to(leaf.weight) for scale, leaf in zip(state["scales"], self.leaves, strict=False)]

    def alpha(self, step: int) -> float:
        """The penalty's weight for a layer of average price."""
        settings = self.settings
        share = min(step / (settings.full * self.steps), 1.0)
        return self.loss * settings.first * (settings.last / settings.first) ** share

    def _rate(self, step: int) -> float:
        schedule = Schedule(self.steps, self.config.warmup, step, step / self.steps)
        return self.config.lr * schedule.factor() / (1 - self.config.momentum)


def resconv(lesson: Lesson) -> Learned:
    """Train a copy of the network with its layer factors under the penalty. The result has shortcuts and no factors:
    those are in the weights. It ranks nothing itself: it is to be judged as any network is.

    Raises UnsupportedModelError when there is nothing that can be removed, and what ``finetune`` raises.
    """
    config = lesson.config
    network, student, loss = with_factors(lesson)
    hook = LayerFactors(network, student, lesson.latency_ms, lesson.budget_ms, config, loss)
    if not hook.factors:
        reasons = "; ".join(f"{path} {reason}" for path, reason in list(refusals(network).items())[:3])
        raise UnsupportedModelError(
            f"{lesson.network.origin}: no layer or branch of this network can be removed ({reasons}); "
            "`edgeprune compress` with another --method narrows its layers"
        )
    history = finetune(
        student.module, lesson.teacher.copy().module, lesson.data, config, lesson.checkpoint, lesson.progress,
        hooks=[hook],
    )  # fmt: skip
    history.notes.append(
        f"resconv: {len(hook.dead)} of {len(hook.factors)} factors came to zero, predicted "
        f"{hook.predicted_ms():.4g} ms without their layers, {lesson.budget_ms:.4g} ms asked"
    )
    return Learned(absorb_factors(unmix(student, network)), {}, {}, history, removed=hook.removed())


def with_factors(lesson: Lesson) -> tuple[Network, Network, float]:
    """(the lesson's network with its factors; the same in the form in which they are learnt; the loss of a network that
    always gives the same answer)."""
    network = instrument(lesson.network)
    inputs = [x for x, _ in lesson.data.batches(64, shuffle_seed=lesson.config.seed, limit=MEASURED)]
    return network, mix(network, carried(network, inputs)), loss_of_constant(lesson, inputs)


def _scale(leaf: Any) -> Tensor:
    """What must not grow: a batch norm's weights one by one, a weighted layer's as a whole."""
    weight: Tensor = leaf.weight.detach()
    return weight if weight.dim() == 1 else weight.norm()


def shrunk(lam: Tensor, threshold: float) -> Tensor:
    """The proximal step of ``threshold * |lam|``: towards zero by ``threshold``, and not past it."""
    return lam.sign() * (lam.abs() - threshold).clamp_min(0.0)


RESCONV = Learner(resconv, prepare)
