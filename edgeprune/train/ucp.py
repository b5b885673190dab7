"""UCP: a channel matters as much as a squeeze-excite gate, trained with the network, lets through of it on average.

Source: UCP (Chang et al., 2020): train with gates, take a channel's mean gate over the data for its importance, prune,
train again. What is left open is as in the authors' public code, whose behaviour was read, not its text: reduction 16,
one hidden unit for 16 channels and fewer, biases on.
    gate:       s = mean of x over the places, per unit;  g = 2 * sigmoid(8 * (W2 relu(W1 s + b1) + b2))
    importance: mean of g over the images and over the layers that read the unit
Shapes: x (N, channels, ...) or (N, ..., channels), what a layer reads; s, g (N, units of a group).

Deviations
    A gate lies on the input of every layer that reads a group. The code has it between convolution and batch norm,
    which divides a good part of it out again.
    W2 and b2 start at zero and the gates go up to 2, so that a trained network computes what it did when the training
    begins; the code trains from scratch.
    The gates of a layer may be 1 on average at first and less and less later; what they are above that is a penalty.
    Nothing but noise moves the gates of a trained network otherwise; so they sink, and those that the loss needs stay
    behind. The factor 8 is there for the same reason: gates must move before the weights make up for it.
    Near the end of the run the gates become constants, their means over images without augmentation, and the network
    goes on training with these. So they fold into the weights that read them with nothing lost: the network that comes
    out is an ordinary one and computes what was trained, and is no new beginning from random weights.
    How many channels stay is planned under latency, as for every method, where the code keeps all above 0.999 of their
    layer's mean gate with a list of exceptions; the gates give the order alone. The channels of a residual stage's
    trunk are one group, whose width is uniform by construction, and are ordered by the gates of all their readers; the
    code takes the norms of the first convolution there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.graph.affine import attenuate
from edgeprune.graph.channels import ChannelGroup, Channels, analyse
from edgeprune.graph.network import Network
from edgeprune.train.dataset import DataSet
from edgeprune.train.evaluate import device_of
from edgeprune.train.finetune import finetune
from edgeprune.train.hooks import Hook
from edgeprune.train.learner import Learned, Lesson, loss_of_constant
from edgeprune.train.readers import along, find_readers, input_channels

REDUCTION = 16
SLOPE = 8.0  # of the gates, so that they move faster than the weights
MEASURED = 1024  # images whose gates are averaged


@dataclass(frozen=True, slots=True)
class Settings:
    """
    pull:   the penalty on gates that are 1 higher than they may be on average, in units of the loss of a network that
            always gives the same answer
    low:    what the gates of a layer may be on average when they become constants; at first it is 1
    settle: share of the run after which the gates are constants
    """

    pull: float = 0.3
    low: float = 0.7
    settle: float = 0.7


class Gate(nn.Module):
    """The gate of one group in front of one layer; (N, units) means over the places -> (N, units)."""

    def __init__(self, units: int, generator: torch.Generator) -> None:
        super().__init__()
        hidden = max(units // REDUCTION, 1)
        self.squeeze, self.excite = nn.Linear(units, hidden), nn.Linear(hidden, units)
        nn.init.kaiming_normal_(self.squeeze.weight, nonlinearity="relu", generator=generator)
        for start_at_zero in (self.squeeze.bias, self.excite.weight, self.excite.bias):
            nn.init.zeros_(start_at_zero)

    def forward(self, means: Tensor) -> Tensor:
        return 2 * torch.sigmoid(SLOPE * self.excite(torch.relu(self.squeeze(means))))


class Gated(nn.Module):
    """A layer with gates on its input, one for each of the groups it reads.

    index:    group name -> (units, multiplicity), as in ``Slot``; in the order of the gates
    constant: (channels,) once the gates no longer look at the input
    seen:     group name -> [sum of the gates (units,) float64, how many], while they are measured
    last:     the gates (N, units) of the passes in training mode that nobody has taken yet
    """

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.reader, self.gates = reader, nn.ModuleList()
        self.index: dict[str, Tensor] = {}
        self.constant: Tensor | None = None
        self.seen: dict[str, list[Any]] | None = None
        self.last: list[Tensor] = []

    def add(self, group: str, index: np.ndarray, generator: torch.Generator) -> None:
        self.index[group] = torch.from_numpy(index)
        self.gates.append(Gate(len(index), generator))

    def forward(self, x: Tensor) -> Tensor:
        scale = self._scale(x) if self.constant is None else self.constant.to(x)
        result: Tensor = self.reader(x * along(self.reader, scale, x))
        return result

    def _scale(self, x: Tensor) -> Tensor:
        """(N, channels), 1 where no gate lies."""
        if isinstance(self.reader, nn.Linear):
            means = x if x.dim() == 2 else x.flatten(1, -2).mean(1)
        else:
            means = x.flatten(2).mean(2)
        scale = torch.ones_like(means)
        for (group, index), gate in zip(self.index.items(), self.gates, strict=True):
            index = index.to(x.device)
            values = gate(means[:, index].mean(2))
            if self.training:
                self.last.append(values)
            if self.seen is not None:
                entry = self.seen.setdefault(group, [0.0, 0])
                entry[0], entry[1] = entry[0] + values.sum(0, dtype=torch.float64).cpu(), entry[1] + len(values)
            scale = scale.index_copy(1, index.ravel(), values.repeat_interleave(index.shape[1], 1))
        return scale

    def settle(self, means: Mapping[str, Tensor]) -> None:
        """Take these means, group name -> (units,), for the gates from now on."""
        self.constant = torch.ones(input_channels(self.reader), dtype=torch.float64)
        for group, index in self.index.items():
            self.constant[index] = means[group].unsqueeze(1)


class Gates(Hook):
    """The gates of some groups of a student, put in when this is made and taken out by ``fold``.

    groups: those whose units are to be ordered; a group that nothing reads gets no gates
    data:   what the mean gates are measured on
    loss:   of a network that always gives the same answer
    means:  reader's path -> group name -> (units,) float64, once measured
    """

    def __init__(
        self,
        student: Network,
        channels: Channels,
        groups: Sequence[ChannelGroup],
        data: DataSet,
        seed: int = 0,
        loss: float = 1.0,
        settings: Settings | None = None,
    ) -> None:
        self.module, self.data, self.seed, self.loss = student.module, data, seed, loss
        self.settings = settings or Settings()
        self.gated: dict[str, Gated] = {}
        self.means: dict[str, dict[str, Tensor]] = {}
        self.steps = 1
        generator = torch.Generator().manual_seed(seed)
        for group in groups:
            for path, index in {r.path: r.index for r in find_readers(student, channels, group)}.items():
                if path not in self.gated:
                    self.gated[path] = Gated(self.module.get_submodule(path))
                self.gated[path].add(group.name, index, generator)
        for path, gated in self.gated.items():
            self._put(path, gated)

    def _put(self, path: str, leaf: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(self.module.get_submodule(owner), name, leaf)

    def scores(self) -> dict[str, np.ndarray]:
        """Group name -> (units,) float64: the mean gates, of all readers alike."""
        of_group: dict[str, list[Tensor]] = {}
        for groups in self.means.values():
            for name, means in groups.items():
                of_group.setdefault(name, []).append(means)
        return {name: torch.stack(means).mean(0).numpy() for name, means in of_group.items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Measure the mean gates in evaluation mode, and let them be constants."""
        training, device = self.module.training, device_of(self.module)
        self.module.eval()
        for gated in self.gated.values():
            gated.seen = {}
        for x, _ in self.data.batches(64, shuffle_seed=self.seed, limit=MEASURED):
            self.module(x.to(device))
        for path, gated in self.gated.items():
            assert gated.seen is not None
            self.means[path] = {name: total / count for name, (total, count) in gated.seen.items()}
            gated.seen = None
            gated.settle(self.means[path])
        self.module.train(training)

    def fold(self) -> None:
        """Take the gates out; the weights that read a unit are multiplied by its mean gate."""
        for path, gated in self.gated.items():
            assert gated.constant is not None
            attenuate(gated.reader, gated.constant)
            self._put(path, gated.reader)

    # --- in the training loop -----------------------------------------------------------------------------------

    def key(self) -> str:
        return f"ucp {self.settings} {self.seed} {MEASURED}"

    def start(self, steps: int) -> None:
        self.steps = steps

    def shorten(self, step: int, steps: int) -> None:
        self.steps = steps

    def penalty(self, step: int) -> Tensor | None:
        """What the gates of a layer and group are above their share on average, each unit worth the same."""
        share = 1 - (1 - self.settings.low) * min((step + 1) / (self.settings.settle * self.steps), 1.0)
        values = [v.mean(0) for gated in self.gated.values() for v in gated.last]
        for gated in self.gated.values():
            gated.last = []
        if not values:
            return None
        above = torch.stack([(v - share).sum().clamp_min(0.0) for v in values]).sum()
        return self.settings.pull * self.loss / sum(map(len, values)) * above

    def after_step(self, step: int, x: Tensor) -> None:
        if not self.means and step + 1 >= self.settings.settle * self.steps:
            self.settle()

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "means": self.means}

    def load(self, state: dict[str, Any]) -> None:
        self.steps, self.means = state["steps"], state["means"]
        for path, gated in self.gated.items():
            gated.constant = None
            if self.means:
                gated.settle(self.means[path])


def ucp(lesson: Lesson) -> Learned:
    """Train a copy of the network with gates. The result is without them, and scores the channels only: what its cuts
    do is to be judged as for any network.

    Raises what ``finetune`` raises.
    """
    network, teacher, config = lesson.network.copy(), lesson.teacher.copy(), lesson.config
    channels = analyse(network)
    groups = [g for g in channels.groups if any(w < g.size for w in lesson.widths.get(g.name, ()))]
    inputs = [x for x, _ in lesson.data.batches(64, shuffle_seed=config.seed, limit=256)]
    loss = loss_of_constant(lesson, inputs)
    hook = Gates(network, channels, groups, lesson.data, config.seed, loss)
    history = finetune(
        network.module, teacher.module, lesson.data, config, lesson.checkpoint, lesson.progress, hooks=[hook]
    )
    hook.fold()
    scores = hook.scores()
    means = np.concatenate([*scores.values()] or [np.ones(1)])
    history.notes.append(
        f"ucp: {len(hook.gated)} layers read through gates, mean gates of {len(scores)} groups from {means.min():.3g} "
        f"to {means.max():.3g}"
    )
    return Learned(network, {}, {}, history, scores)
