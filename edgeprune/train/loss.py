"""What a student is trained on: the original network's outputs, and labels where there are any.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015), eq. 4: KL divergence of scores
softened by a temperature T, times T^2 so that its gradient does not depend on T.
Shapes: outputs are tuples of float32 tensors, batch first; labels are (N,) int64.
Deviation: outputs that are no class scores (maps, boxes, embeddings) are matched by their squared error relative to
the squared size of the original's output, so that several outputs of different scale can be added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from edgeprune.errors import DataError, UsageError
from edgeprune.train.config import TrainConfig

Outputs = tuple[torch.Tensor, ...]
_TINY = 1e-8


def as_outputs(value: object) -> Outputs:
    """A network's result as a flat tuple of tensors."""
    if isinstance(value, torch.Tensor):
        return (value,)
    assert isinstance(value, (tuple, list))
    return tuple(value)


def is_probabilities(output: torch.Tensor) -> bool:
    """(N, C) rows that are non-negative and add up to one: a softmax is part of the network."""
    return bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-3).all())


def is_scores(output: torch.Tensor) -> bool:
    """Whether an output looks like class scores: (N, C), C > 1, and not rows of one length (an embedding)."""
    if output.dim() != 2 or output.shape[1] < 2 or not output.is_floating_point():
        return False
    norms = output.norm(dim=1)
    embedding = len(norms) > 1 and bool((norms - norms.mean()).abs().max() < 1e-3 * norms.mean())
    return not embedding or is_probabilities(output)


class Objective:
    """Decided once, on a first batch of the original's outputs (or of the student's, where there is no original)."""

    def __init__(self, config: TrainConfig, sample: Outputs, labelled: bool, distil: bool, name: str):
        self.config = config
        self.kinds = [
            "probabilities"
            if config.loss != "values" and o.dim() == 2 and o.shape[1] > 1 and is_probabilities(o)
            else "scores"
            if config.loss == "scores" or (config.loss == "auto" and is_scores(o))
            else "values"
            for o in sample
        ]
        if config.loss == "scores" and any(o.dim() != 2 for o in sample):
            raise UsageError("loss 'scores' needs outputs of shape (N, classes); use 'values' for anything else")
        weights = config.output_weights or (1.0,) * len(sample)
        if len(weights) != len(sample):
            raise UsageError(f"{len(weights)} output weights are given, the network has {len(sample)} outputs")
        self.weights = [w / sum(weights) for w in weights]
        self.classes = sample[0].shape[1] if self.kinds[0] != "values" else None
        self.labels = labelled and self.classes is not None
        if not distil and not self.labels:
            raise DataError(f"{name}: no class labels in the data and no original network to learn from")
        self.distil = distil

    def __call__(self, student: Outputs, teacher: Outputs | None, y: torch.Tensor | None) -> torch.Tensor:
        """The loss, a scalar."""
        total = student[0].new_zeros(())
        share = self.config.label_weight if self.labels and self.distil else 0.0
        if self.distil:
            assert teacher is not None
            for kind, weight, s, t in zip(self.kinds, self.weights, student, teacher, strict=True):
                total = total + (1 - share) * weight * self._distance(kind, s, t)
        if self.labels and (share > 0 or not self.distil):
            assert y is not None
            scores = self._logits(self.kinds[0], student[0])
            total = total + (share if self.distil else 1.0) * functional.cross_entropy(scores, y)
        return total

    def of_constant(self, sample: Outputs, labels: Sequence[int] | None) -> float:
        """The loss of a network that gives the same answer whatever it is shown: what is much worse has diverged."""
        loss = math.log(self.classes) if self.labels and self.classes else 0.0
        if not self.distil:
            return loss
        distances = [
            1.0 if kind == "values" else float(self._distance(kind, o.mean(0, keepdim=True).expand_as(o), o))
            for kind, o in zip(self.kinds, sample, strict=True)
        ]
        return max(loss, *distances)

    def _distance(self, kind: str, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if kind == "values":
            return (s - t).square().sum() / t.square().sum().clamp_min(_TINY)
        temperature = self.config.temperature
        log_p = functional.log_softmax(self._logits(kind, s) / temperature, 1)
        log_q = functional.log_softmax(self._logits(kind, t) / temperature, 1)
        return temperature**2 * functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    @staticmethod
    def _logits(kind: str, output: torch.Tensor) -> torch.Tensor:
        return output.clamp_min(_TINY).log() if kind == "probabilities" else output


def check_labels(labels: Sequence[int] | None, classes: int | None, name: str) -> None:
    """Raise DataError where a label lies beyond the network's classes."""
    if labels is not None and classes is not None and len(labels) and max(labels) >= classes:
        raise DataError(f"{name}: labels go up to {max(labels)}, the network tells {classes} classes apart")
