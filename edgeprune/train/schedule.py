"""How many steps, and the learning rate of each: linear warm-up, then a cosine down to zero at the last step."""

from __future__ import annotations

import math
from dataclasses import dataclass

RESERVE = 0.04  # of a time limit, for what was not measured


@dataclass(slots=True)
class Schedule:
    """steps: all of them; step: done so far; phase: 0 at the start, 1 at the end, what the learning rate depends on.
    While ``steps`` stands, phase is step / steps; when it is shortened, the rest of the phases is spread anew."""

    steps: int
    warmup: float
    step: int = 0
    phase: float = 0.0

    def factor(self) -> float:
        """Learning rate of the coming step relative to its peak."""
        middle = self.phase + 0.5 * (1 - self.phase) / max(1, self.steps - self.step)
        if middle < self.warmup:
            return middle / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (middle - self.warmup) / (1 - self.warmup)))

    def advance(self) -> None:
        self.phase += (1 - self.phase) / (self.steps - self.step)
        self.step += 1

    @property
    def done(self) -> bool:
        return self.step >= self.steps


def steps_within(seconds: float, asked_s: float, remembered_s: float, asked_steps: int | None) -> int:
    """Steps that fit into ``seconds``: the first ``asked_steps`` (None: all) cost ``asked_s``, the rest
    ``remembered_s``. At least 1."""
    seconds *= 1 - RESERVE
    if asked_steps is None or asked_steps * asked_s >= seconds:
        return max(1, int(seconds / asked_s))
    return max(1, asked_steps + int((seconds - asked_steps * asked_s) / remembered_s))
