"""The original network's answers: asked for, or remembered per sample and augmented view.

A third to a half of distillation is the original's forward pass. Views repeat (see ``TrainConfig.teacher_views``), so
its answers are kept where they are small, and that share is saved from the second round on. Answers are always asked
for whole training batches, so that an interrupted run computes the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.train.loss import Outputs, as_outputs

FEWEST = 4
KEEP_BYTES = 64 << 20  # kept answers are part of every checkpoint


class Teacher:
    """views: how many views are remembered, 0 for none; ``view_of`` tells which view an epoch shows."""

    def __init__(self, module: nn.Module, samples: int, example: Outputs):
        self.module = module.eval()
        self.views = 0
        self.shapes = [tuple(o.shape[1:]) for o in example]
        self.samples = samples
        self.answers: list[list[torch.Tensor]] = []
        self.known: list[np.ndarray] = []

    def remember(self, views: int) -> None:
        """Keep the answers to so many views, or fewer where they are large, or none where few views would be left:
        a sample seen in hardly any view is learnt by heart."""
        each = sum(math.prod(shape) for shape in self.shapes) * 4 * self.samples
        fit = KEEP_BYTES // max(each, 1)
        self.views = min(views, fit) if fit >= min(views, FEWEST) else 0

    def view_of(self, epoch: int) -> int:
        return epoch % self.views if self.views else epoch

    def ask(self, x: torch.Tensor) -> Outputs:
        with torch.no_grad():
            return as_outputs(self.module(x))

    def remembers(self, view: int, positions: np.ndarray) -> bool:
        return view < len(self.known) and bool(self.known[view][positions].all())

    def answer(self, x: torch.Tensor, view: int, positions: np.ndarray) -> Outputs:
        """The outputs for the batch ``x``, which shows the samples at ``positions`` in view ``view``."""
        index = torch.from_numpy(positions)
        if self.remembers(view, positions):
            return tuple(kept[index].to(x.device) for kept in self.answers[view])
        outputs = self.ask(x)
        if self.views:
            while len(self.known) <= view:
                self.answers.append([torch.zeros(self.samples, *shape) for shape in self.shapes])
                self.known.append(np.zeros(self.samples, bool))
            for kept, output in zip(self.answers[view], outputs, strict=True):
                kept[index] = output.float().cpu()
            self.known[view][positions] = True
        return outputs

    def state(self) -> list[Any]:
        return [[known_answers, torch.from_numpy(k)] for known_answers, k in zip(self.answers, self.known, strict=True)]

    def load(self, state: list[Any]) -> None:
        self.answers = [list(answers) for answers, _ in state]
        self.known = [known.numpy() for _, known in state]
