"""What a learning method may do inside the training loop of ``finetune``, beside the task's own loss and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Hook:
    """Every method does nothing unless overridden. One step of training is

        forward -> after_forward -> penalty -> backward -> optimiser -> after_step -> done?

    A hook belongs to one student and draws all randomness from the step's number, so that a run that was killed and
    goes on computes the same. After a step that diverged it is given the state it had some steps before.
    """

    def key(self) -> str:
        """All settings that decide what it does; a checkpoint of a run with other ones is not gone on with."""
        return type(self).__name__

    def start(self, steps: int) -> None:
        """Called once, when the run's number of steps is known. Also called with a small number before a few steps are
        timed; then ``load`` brings back the state from before."""

    def shorten(self, step: int, steps: int) -> None:
        """Before step ``step`` a run under a time limit was found too long: it now has ``steps`` steps in all, fewer
        than it was told before. A run never becomes longer."""

    def after_forward(self, step: int, x: Tensor) -> None:
        """The student has answered the batch ``x`` (N, ...), in training mode and with the weights it still has."""

    def penalty(self, step: int) -> Tensor | None:
        """A scalar added to the loss, None for nothing."""
        return None

    def after_step(self, step: int, x: Tensor) -> None:
        """The optimiser has changed the weights; proximal steps and the like are taken here, without gradients."""

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on and is not in the student's state_dict: tensors, numbers, text,
        lists and dicts of them."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take on a state that ``state`` returned."""

    def done(self) -> bool:
        """Whether the run ends with this step, before all steps are taken."""
        return False

    def finish(self) -> None:
        """The student has the weights that the run ends with, which may be an average over its steps or those of an
        earlier one; without gradients. What must hold for them is made to."""


class Hooks:
    """Several hooks as one, in order."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self.hooks = tuple(hooks)

    def __bool__(self) -> bool:
        return bool(self.hooks)

    def key(self) -> str:
        return " ".join(hook.key() for hook in self.hooks)

    def start(self, steps: int) -> None:
        for hook in self.hooks:
            hook.start(steps)

    def shorten(self, step: int, steps: int) -> None:
        for hook in self.hooks:
            hook.shorten(step, steps)

    def after_forward(self, step: int, x: Tensor) -> None:
        for hook in self.hooks:
            hook.after_forward(step, x)

    def penalised(self, loss: Tensor, step: int) -> Tensor:
        """The loss with all penalties."""
        for hook in self.hooks:
            extra = hook.penalty(step)
            loss = loss if extra is None else loss + extra
        return loss

    def after_step(self, step: int, x: Tensor) -> None:
        for hook in self.hooks:
            hook.after_step(step, x)

    def state(self) -> list[dict[str, Any]]:
        return [hook.state() for hook in self.hooks]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        for hook, state in zip(self.hooks, states, strict=True):
            hook.load(state)

    @torch.no_grad()
    def finish(self) -> None:
        for hook in self.hooks:
            hook.finish()

    def done(self) -> bool:
        return any(hook.done() for hook in self.hooks)
