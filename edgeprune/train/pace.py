"""Time: how long a run took so far, how many steps fit into its limit, and whether it still keeps it."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from edgeprune.train.config import TrainConfig
from edgeprune.train.schedule import Schedule, steps_within

EARLY = 0.1  # of a time limit: too soon to tell how fast the machine is
TOLERANCE = 0.03  # a time limit that is about to be passed by more than this gets a shorter schedule
SLOWER = "the machine became slower than measured"
RECENT = 40  # steps whose median tells the present speed


class Pace:
    """evaluation_s: seconds of one evaluation on the validation samples, 0 without any."""

    def __init__(self, config: TrainConfig, started: float):
        self.limit_s = None if config.minutes is None else config.minutes * 60
        self.evaluations = config.evaluations + 1
        self.evaluation_s = 0.0
        self.before, self.started = 0.0, started
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.planned = 0  # steps, before any was given up

    def go_on(self, elapsed_s: float, evaluation_s: float, planned: int) -> None:
        """After an interruption: what was spent before counts, what lay between does not."""
        self.before, self.started, self.evaluation_s = elapsed_s, time.monotonic(), evaluation_s
        self.planned = planned

    def elapsed(self) -> float:
        """Seconds of work, over all calls that the run took."""
        return self.before + time.monotonic() - self.started

    def took(self, step_s: float) -> None:
        self.recent.append(step_s)

    def steps(self, asked_s: float, remembered_s: float, asked_steps: int | None) -> int:
        assert self.limit_s is not None
        left = self.limit_s - self.elapsed() - self.evaluations * self.evaluation_s
        return steps_within(left, asked_s, remembered_s, asked_steps)

    def left_s(self, schedule: Schedule) -> float:
        """Estimate until the last step, evaluations included."""
        remaining = schedule.steps - schedule.step
        evaluations = self.evaluations * remaining / schedule.steps
        return remaining * float(np.median(self.recent)) + evaluations * self.evaluation_s

    def keep_within_limit(self, schedule: Schedule, notes: list[str]) -> None:
        """Shorten the schedule where the limit would be passed, and let one of the notes say by how much in all."""
        if self.limit_s is None or self.elapsed() < EARLY * self.limit_s:
            return
        needed, left = self.left_s(schedule), self.limit_s - self.elapsed()
        if needed <= left + TOLERANCE * self.limit_s:
            return
        self.planned = self.planned or schedule.steps
        schedule.steps = schedule.step + max(1, int((schedule.steps - schedule.step) * max(left, 0.0) / needed))
        notes[:] = [note for note in notes if not note.startswith(SLOWER)]
        notes.append(f"{SLOWER}: {schedule.steps} steps instead of {self.planned}")
