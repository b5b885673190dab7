"""Approximated oracle filter pruning, driven by measured latency: units are ablated at random beside ordinary training.

Source: Ding, Ding, Guo, Han, Yan, "Approximated Oracle Filter Pruning for Destructive CNN Width Optimization" (ICML
2019); what the paper leaves open is as in the authors' public code, whose behaviour was read, not its text.
    ablation.py   the scoring pass: what random halves of a group's units do to the layers that read it
    halving.py    the binary filter search of one group: move, half, restart
    here          all groups at once, beside the training loop; which moves are taken, and when it is enough

Deviations
    A group's steps lead to widths that the measured stairs make worthwhile, and a move must make the network faster.
    No move reaches further than to the budget, and the search ends where the predicted latency is within it; the
    source ends at a share of multiply-adds.
    Moves are taken when every group has looked for one (a cycle), those with the least damage per millisecond first,
    until the cycle has brought its share of the way. Moves that were cheap enough but dearer are looked for anew.
    The threshold starts at the source's 0.01. After a cycle that brought less than its share it is raised: to where
    the refused moves that would pass bring what is missing, and at least by a factor. The source keeps it.
    The number of batches between two decisions follows from the length of the run and not from a setting of its own
    (1 000 in the source), and every batch is many draws. A run that is shortened gets as many decisions.
    Residual groups are searched too, not only the layers inside of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from edgeprune.graph.channels import analyse
from edgeprune.graph.network import Network
from edgeprune.train.ablation import Ablation, silence
from edgeprune.train.finetune import finetune
from edgeprune.train.halving import TINY, Search
from edgeprune.train.hooks import Hook
from edgeprune.train.learner import Learned, Lesson, Price

FEWEST = 64  # draws between two decisions of a group


@dataclass(frozen=True, slots=True)
class Settings:
    """
    theta:  relative damage of the next layers below which a move is taken at first
    growth: how much theta is raised, at least
    draws:  random subsets per batch; a batch's images are divided among them
    rounds: how many rounds of draws each group gets in a run; each ends in a decision
    warmup: share of the run before the first draw
    end:    share of the run in which the budget should be reached
    """

    theta: float = 0.01
    growth: float = 1.5
    draws: int = 64
    rounds: int = 48
    warmup: float = 0.05
    end: float = 0.8


class Aofp(Hook):
    """The search over all groups of a student that have a narrower candidate width and a reader.

    widths, latency_ms, budget_ms: as in ``Lesson``
    """

    def __init__(
        self,
        student: Network,
        widths: Mapping[str, tuple[int, ...]],
        latency_ms: Price,
        budget_ms: float,
        seed: int = 0,
        settings: Settings | None = None,
    ) -> None:
        self.channels = analyse(student)
        groups = [g for g in self.channels.groups if any(w < g.size for w in widths.get(g.name, ()))]
        self.ablation = Ablation(student, self.channels, groups)
        self.searches = {g.name: Search(g.size, widths[g.name]) for g in groups if self.ablation.readers[g.name]}
        self.latency_ms, self.budget_ms, self.seed = latency_ms, budget_ms, seed
        self.settings = settings or Settings()
        self.theta = self.settings.theta
        self.steps, self.period, self.first = 0, 1.0, 0
        self._settle()
        self._new_cycle(0)

    def attached(self) -> AbstractContextManager[None]:
        """While entered, the student's masked units are at zero, and its passes are seen."""
        return self.ablation.attached()

    def widths(self) -> dict[str, int]:
        return {name: search.width for name, search in self.searches.items()}

    def alive(self) -> dict[str, np.ndarray]:
        """Group name -> (units,) bool."""
        return {name: search.alive for name, search in self.searches.items()}

    def moves(self) -> int:
        return sum(len(search.moves) for search in self.searches.values())

    # --- in the training loop -----------------------------------------------------------------------------------

    def key(self) -> str:
        return f"aofp {self.settings} {self.seed} {sorted(self.searches)}"

    def start(self, steps: int) -> None:
        settings = self.settings
        self.steps, self.first = steps, int(settings.warmup * steps)
        self._new_cycle(self.first)
        self.period = max(1, (steps - self.first) // settings.rounds)
        self.ablation.watching = self.first == 0

    def shorten(self, step: int, steps: int) -> None:
        left = (steps - step) / (self.steps - step)
        self.steps, self.period = steps, left * self.period
        if step < self.first:
            self.first = step + int(left * (self.first - step))
            self._new_cycle(self.first)
        self.ablation.watching = step >= self.first and not self.done()

    def after_forward(self, step: int, x: Tensor) -> None:
        for i, (name, search) in enumerate(self.searches.items()):
            # groups begin one after the other, so that their decisions do not fall on the same step
            begins = self.first + int(i * self.period / len(self.searches))
            if step < begins or not self._goes_on(search) or not self.ablation.watching:
                continue
            rng = np.random.default_rng((self.seed, step, i, 59))
            parts = min(self.settings.draws, len(x)) if self.ablation.divisible(name, len(x)) else 1
            drawn = search.draw(rng, parts)
            search.charge(drawn, self.ablation.damage(name, drawn))
        self.ablation.forget()

    def after_step(self, step: int, x: Tensor) -> None:
        for search in self.searches.values():
            if self._goes_on(search) and search.batches >= self.period and search.draws >= FEWEST:
                search.decide(self.theta)
        looking = [s for s in self.searches.values() if self._movable(s)]
        if not self.done() and all(s.looked for s in looking):
            self._end_cycle(step)
        self.ablation.watching = step + 1 >= self.first and not self.done()

    def done(self) -> bool:
        """Within the budget, or nothing is left to take."""
        return self.now_ms <= self.budget_ms or not any(map(self._movable, self.searches.values()))

    def state(self) -> dict[str, Any]:
        return {
            "theta": self.theta,
            "period": self.period,
            "first": self.first,
            "steps": self.steps,
            "began": [self.began[0], self.began[1] / self.latency_ms({}, ())],
            "watching": self.ablation.watching,
            # another process prices the same network a little differently: what was asked is the share, and the widths
            "share": self.budget_ms / self.latency_ms({}, ()),
            "widths": {name: list(search.widths) for name, search in self.searches.items()},
            "searches": {name: search.state() for name, search in self.searches.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        self.theta, self.period, self.first = state["theta"], state["period"], state["first"]
        full_ms = self.latency_ms({}, ())
        self.steps, self.began = state["steps"], (state["began"][0], state["began"][1] * full_ms)
        self.budget_ms = state["share"] * full_ms
        for name, search in self.searches.items():
            search.widths = tuple(state["widths"][name])
            search.load(state["searches"][name])
        self.ablation.watching = state["watching"]
        self.ablation.forget()
        self._settle()

    # --- decisions ----------------------------------------------------------------------------------------------

    @staticmethod
    def _movable(search: Search) -> bool:
        return search.waiting is not None or search.step() > 0

    @staticmethod
    def _goes_on(search: Search) -> bool:
        return search.waiting is None and search.step() > 0

    def _settle(self) -> None:
        self.ablation.mask(self.alive())
        now = self.widths()
        self.now_ms = self.latency_ms(now, ())
        for name, search in self.searches.items():  # no move has to reach further than to the budget
            search.floor = 0
            for width in (w for w in search.widths if w < search.width):
                if self.latency_ms({**now, name: width}, ()) > self.budget_ms:
                    break
                search.floor = width

    def _end_cycle(self, step: int) -> None:
        began, before_ms = self.began
        cycles = max((self.settings.end * self.steps - began) / (step + 1 - began), 1.0)
        share_ms = (before_ms - self.budget_ms) / cycles
        while before_ms - self.now_ms < share_ms and (best := self._cheapest()) is not None:
            best.accept()
            self._settle()
        for search in self.searches.values():
            if search.waiting is not None:
                search.restart()
        if before_ms - self.now_ms < share_ms:
            self._raise(share_ms - (before_ms - self.now_ms))
        self._new_cycle(step + 1)

    def _cheapest(self) -> Search | None:
        """The search whose waiting move does the least damage per millisecond."""
        best: tuple[float, float, Search] | None = None
        for name, search in self.searches.items():
            move = search.affordable()
            if move is None:
                continue
            gain = self._gain(name, search.width - len(move.units))
            if gain <= 0:
                search.decline()
            elif best is None or (move.damage / gain, -gain) < best[:2]:
                best = (move.damage / gain, -gain, search)
        return None if best is None else best[2]

    def _gain(self, name: str, width: int) -> float:
        """Milliseconds saved when one group goes down to a width."""
        return self.now_ms - self.latency_ms({**self.widths(), name: width}, ())

    def _raise(self, missing_ms: float) -> None:
        """Raise the threshold to where the cheapest move of each group that was refused brings what is missing."""
        refused = []
        for name, search in self.searches.items():
            for damage, width in sorted((d, w) for w, d in search.refused.items())[:1]:
                refused.append((damage, self._gain(name, width)))
        self.theta = max(self.settings.growth * self.theta, TINY)
        for damage, gain in sorted(refused):
            if missing_ms > 0 and math.isfinite(damage):
                self.theta, missing_ms = max(self.theta, damage), missing_ms - max(gain, 0.0)

    def _new_cycle(self, step: int) -> None:
        self.began = (step, self.now_ms)
        for search in self.searches.values():
            search.looked = False


def aofp(lesson: Lesson) -> Learned:
    """Train a copy of the network and take away, beside that, what the next layers miss least.

    Raises what ``finetune`` raises.
    """
    network, teacher = lesson.network.copy(), lesson.teacher.copy()
    hook = Aofp(network, lesson.widths, lesson.latency_ms, lesson.budget_ms, lesson.config.seed)
    with hook.attached():
        history = finetune(
            network.module, teacher.module, lesson.data, lesson.config, lesson.checkpoint, lesson.progress, hooks=[hook]
        )
    silence(network, hook.channels, hook.alive())
    spent = sum(move.damage for search in hook.searches.values() for move in search.moves)
    history.notes.append(
        f"aofp: {hook.moves()} moves, predicted {hook.now_ms:.4g} ms of {lesson.budget_ms:.4g} ms asked, "
        f"next-layer damage up to {hook.theta:.3g}"
    )
    rankings = {name: search.ranking(hook.theta, max(spent, TINY)) for name, search in hook.searches.items()}
    return Learned(network, rankings, {}, history)
