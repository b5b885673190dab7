"""What training is asked (TrainConfig), what it says while it runs (Progress) and what it did (History)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from edgeprune.errors import UsageError

LOSSES = ("auto", "scores", "values")
BATCH_NORMS = ("train", "frozen")
AUGMENTS = ("auto", "none", "crop", "crop+flip")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a compressed network is trained. One of ``epochs``, ``minutes``, ``steps`` says how long (default: 5 epochs).

    minutes: a time limit. The steps that fit are counted from measured steps, with the learning rate annealed to zero
        at the last one; a machine that later turns slower than measured gets a shorter schedule, and History says so.
    lr: peak of the one-cycle schedule (linear ``warmup``, cosine to zero); nesterov momentum.
    weight_decay: on weights of convolutions and linears only.
    temperature: of distillation from class scores. label_weight: share of the task loss where there are labels.
    loss: "scores" (KL of softened class scores), "values" (relative squared error), "auto" looks at the outputs.
    output_weights: one per output of the network; equal if None.
    batch_norm: "train" follows the batches, "frozen" keeps the running statistics.
    ema: decay of an average of the weights that is what training ends with; None is none.
    teacher_views: the original's answers are kept for this many augmented views of each sample, which are then seen
        again and again; 0 draws a new view every epoch and asks the original every time; None: a quarter of the
        epochs, at least 4.
    """

    epochs: float | None = None
    minutes: float | None = None
    steps: int | None = None
    batch_size: int = 128
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    clip_norm: float = 5.0
    temperature: float = 4.0
    label_weight: float = 0.1
    loss: str = "auto"
    output_weights: tuple[float, ...] | None = None
    batch_norm: str = "train"
    ema: float | None = None
    augment: str = "auto"
    teacher_views: int | None = None
    seed: int = 0
    device: str = "auto"
    checkpoint_s: float = 30.0
    evaluations: int = 4

    def __post_init__(self) -> None:
        given = [n for n in ("epochs", "minutes", "steps") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError(f"training length is given as {' and '.join(given)}; expected one of them")
        for name in (*given, "batch_size", "lr", "temperature", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}; expected more than 0")
        for name, low, high in (("warmup", 0, 0.9), ("label_weight", 0, 1), ("momentum", 0, 0.9999)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}; expected {low} to {high}")
        for name, known in (("loss", LOSSES), ("batch_norm", BATCH_NORMS), ("augment", AUGMENTS)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"ema is {self.ema}; expected between 0 and 1")

    def digest(self) -> str:
        """Of everything that decides the result; how often to save or where to run does not."""
        doc = dataclasses.asdict(self)
        for name in ("device", "checkpoint_s"):
            del doc[name]
        return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Progress:
    """Reported after every step. loss: smoothed. left_s: estimate of the time until the last step."""

    step: int
    steps: int
    loss: float
    lr: float
    elapsed_s: float
    left_s: float


@dataclass(slots=True)
class History:
    """What training did. losses: (step, smoothed loss) about a hundred times; validation: (step, top-1); notes: what
    was out of the ordinary, one sentence each. resumed_from: the step at which this call went on, 0 from scratch."""

    steps: int = 0
    epochs: float = 0.0
    seconds: float = 0.0
    images_per_s: float = 0.0
    resumed_from: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    selected_step: int = 0
    rollbacks: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
