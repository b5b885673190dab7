"""What a learning method is asked and what it answers, the common form of all that decide by training.

A learner trains a copy of the network under latency prices and says which of its channels and blocks it came to need
least. It cuts nothing: its rankings and damages go to a planner and the measured closing loop, as those of any other
method do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from edgeprune.graph.network import Network
from edgeprune.plan.problem import Ranking
from edgeprune.train.config import History, Progress, TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.loss import Objective, as_outputs

Price = Callable[[Mapping[str, int], Collection[str]], float]


@dataclass(frozen=True, slots=True)
class Lesson:
    """
    network:    what is to be learnt from, with everything still in it; learners train a copy
    teacher:    the original, whose outputs are matched
    widths:     group name -> candidate widths, ascending, the last one the full size
    latency_ms: (group name -> width, groups not named are whole; names of removed blocks) -> predicted ms
    budget_ms:  the latency to reach, in the same milliseconds
    config:     how long and how to train
    checkpoint: the file that lets a killed run go on
    """

    network: Network
    teacher: Network
    data: DataSet
    widths: Mapping[str, tuple[int, ...]]
    latency_ms: Price
    budget_ms: float
    config: TrainConfig
    checkpoint: Path | None = None
    progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """
    network:      trained, nothing cut: its groups and blocks are those of ``Lesson.network``. What the learner gave up
                  contributes nothing any more: cutting it changes no output, and keeping some of it does no harm.
    rankings:     group name -> Ranking; groups without one stay whole
    block_damage: block name -> damage in the unit of the rankings; blocks without one stay
    history:      of the training
    scores:       where nothing is ranked: group name -> (units,) importance, by which the units of a group are ordered
                  when the network is judged as any other
    removed:      where nothing is ranked: the blocks that were given up
    """

    network: Network
    rankings: Mapping[str, Ranking]
    block_damage: Mapping[str, float]
    history: History = field(default_factory=History)
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Learner:
    """
    train:      does it. Raises what ``finetune`` raises.
    instrument: the original -> a network of the same outputs with all in it that can be learnt to be left out; prices
                and plans are made for this network. None: the original as it is.
    """

    train: Callable[[Lesson], Learned]
    instrument: Callable[[Network], Network] | None = None


def loss_of_constant(lesson: Lesson, inputs: Sequence[torch.Tensor]) -> float:
    """The training loss of a network that always gives the same answer, the scale of all penalties; inputs: batches
    (n, ...)."""
    teacher = lesson.teacher.copy().module.eval()
    with torch.no_grad():
        answers = [as_outputs(teacher(x)) for x in inputs]
    sample = tuple(torch.cat(parts) for parts in zip(*answers, strict=True))
    return Objective(lesson.config, sample, lesson.data.labelled, True, lesson.data.name).of_constant(sample, None)
