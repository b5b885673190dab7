"""Fine-tuning that can be killed: distillation from the original network, with labels where there are any.

Everything random in step ``n`` is drawn from (seed, n) and not from a generator that lives on, and a checkpoint holds
all the rest; so a run that is killed and started again computes what an uninterrupted one does, bit by bit on a CPU
with the same number of threads. A run under a time limit fixes its number of steps at the start, for the same reason.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.errors import EdgepruneError
from edgeprune.train import checkpoint
from edgeprune.train.anchor import anchor_if_better, norms
from edgeprune.train.augment import chosen
from edgeprune.train.config import History, Progress, TrainConfig
from edgeprune.train.dataset import Batch, DataSet
from edgeprune.train.evaluate import device_of, evaluate
from edgeprune.train.feed import Feed
from edgeprune.train.hooks import Hook, Hooks
from edgeprune.train.loss import Objective, Outputs, as_outputs, check_labels
from edgeprune.train.modules import check_finite, identity_of, optimizer_for, place, training_mode
from edgeprune.train.pace import Pace
from edgeprune.train.schedule import Schedule
from edgeprune.train.teacher import Teacher

SNAPSHOT_STEPS = 20  # how far a diverged run goes back
MAX_ROLLBACKS = 8
DIVERGED = 3.0  # times the loss of a constant answer, or of the first step where that is larger
ANCHOR_SAMPLES = 1024
TIMED = 6  # steps of each kind that tell how long one takes
REPEATS = 4  # how often a view is shown in a long run, so that the original is asked for a quarter of the steps
_SMOOTH = 0.95


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: DataSet,
    config: TrainConfig,
    checkpoint_path: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    validation: DataSet | None = None,
    hooks: Sequence[Hook] = (),
) -> History:
    """Train ``student`` in place to answer like ``teacher`` (and the labels); it ends in eval mode.

    student, teacher: modules of one input (N, ...) and one or several outputs, batch first; the teacher stays as it
        is and may be None where the data is labelled.
    data: of a resized view the student sees its size, the teacher the full one, both the same augmented picture
    checkpoint_path: where the run is saved every ``config.checkpoint_s`` seconds; if the file is there already the run
        goes on from it, and a finished run is not repeated.
    validation: labelled samples; the best weights on them are kept. Without them the last ones are.
    hooks: what a learning method does at every step, in this order (train/hooks.py).
    Raises DataError (nothing to learn from, labels beyond the classes, numbers that are not finite in the data),
    UsageError (the checkpoint belongs to another run), EdgepruneError (training diverges at any learning rate).
    """
    started = time.monotonic()
    cuda = torch.cuda.is_available() and config.device != "cpu"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        device = torch.device("cuda" if config.device == "auto" and cuda else config.device.replace("auto", "cpu"))
        home = device_of(student)
        try:
            run = _Run(student, teacher, data, config, device, checkpoint_path, validation, Hooks(hooks), started)
            with run.feed:
                return run.train(progress)
        finally:
            place(student, home, torch.contiguous_format)
            if teacher is not None:
                place(teacher, home, torch.contiguous_format)
            student.eval()


class _Run:
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: DataSet,
        config: TrainConfig,
        device: torch.device,
        path: Path | None,
        validation: DataSet | None,
        hooks: Hooks,
        started: float,
    ):
        self.student, self.data, self.config, self.device, self.path = student, data.full, config, device, path
        self.seen = data.seen
        self.validation = validation if validation is not None and validation.labelled else None
        self.hooks = hooks
        self.identity = identity_of(student, teacher, data, config, hooks.key())
        self.batch_size = min(config.batch_size, len(data))
        self.batch_norm = config.batch_norm if self.batch_size > 1 else "frozen"  # one sample has no statistics
        self.history = History()
        self.pace = Pace(config, started)
        self.format = torch.channels_last if len(data.input_shape) == 4 else torch.contiguous_format
        place(student, device, self.format)
        if teacher is not None:
            place(teacher, device, self.format)
            teacher.eval()

        x, _ = self.data.batch(data.order(config.seed)[: max(2, min(512, len(data)))])
        check_finite(x, data)
        look = self.seen if teacher is None else lambda x: x
        judge = teacher if teacher is not None else student.eval()
        sample = self._outputs(judge, look(x))
        self.objective = Objective(config, sample, data.labelled, teacher is not None, data.name)
        labels = None if data.labels is None else data.labels.tolist()
        if self.objective.labels:
            check_labels(labels, self.objective.classes, data.name)
        self.constant_loss = self.objective.of_constant(sample, labels)
        scores = self.objective.classes is not None
        augment, note = chosen(
            config.augment, self.data.input_shape, config.seed, x,
            lambda x: self._outputs(judge, look(x))[0] if scores else None,
        )  # fmt: skip
        if note:
            self.history.notes.append(note)
        self.teacher = None if teacher is None else Teacher(teacher, len(data), sample)
        view_of = self.teacher.view_of if self.teacher is not None else lambda epoch: epoch
        self.feed = Feed(self.data, self.batch_size, config.seed, augment, view_of)
        self.optimizer = optimizer_for(student, config)
        self.average: dict[str, torch.Tensor] | None = None
        self.schedule = Schedule(0, config.warmup)
        self.lr_scale = 1.0
        self.smoothed: float | None = None
        self.first_loss = 0.0
        self.best: tuple[float, int, dict[str, torch.Tensor]] | None = None

    # --- the loop -----------------------------------------------------------------------------------------------

    def train(self, progress: Callable[[Progress], None] | None) -> History:
        saved = checkpoint.load(self.path, self.identity) if self.path is not None else None
        if saved is not None:
            self._restore(saved)
            self.pace.go_on(saved["elapsed_s"], saved["evaluation_s"], saved.get("planned", 0))
            self.history.resumed_from = self.schedule.step
            if saved["done"]:
                return self.history
        else:
            self._anchor()
            if self.config.ema is not None:
                self.average = copy.deepcopy(self._weights())
            self._evaluate()
            self.schedule.steps = self._count_steps()
            self.hooks.start(self.schedule.steps)
        good, pending, saved_at = self._state(), self.feed.load(self.schedule.step), time.monotonic()
        if saved is None and self.path is not None:
            self._save(good)
        while not self.schedule.done and not self.hooks.done():
            step, begun = self.schedule.step, time.monotonic()
            batch = pending.result()
            if step + 1 < self.schedule.steps:
                pending = self.feed.load(step + 1)
            lr = self.config.lr * self.lr_scale * self.schedule.factor()
            loss = self._step(self.student, self.optimizer, batch, step, lr)
            if self._diverged(loss):
                self._back(good, loss)
                pending = self.feed.load(self.schedule.step)
                continue
            self.first_loss = self.first_loss or loss
            self.smoothed = loss if self.smoothed is None else _SMOOTH * self.smoothed + (1 - _SMOOTH) * loss
            self.schedule.advance()
            self.pace.took(time.monotonic() - begun)
            self._record()
            if progress is not None:
                left_s = self.pace.left_s(self.schedule)
                progress(Progress(step + 1, self.schedule.steps, self.smoothed, lr, self.pace.elapsed(), left_s))
            if self.schedule.step % SNAPSHOT_STEPS == 0 and not self.schedule.done:
                planned = self.schedule.steps
                self.pace.keep_within_limit(self.schedule, self.history.notes)
                if self.schedule.steps < planned:
                    self.hooks.shorten(self.schedule.step, self.schedule.steps)
                good = self._state()
                if self.path is not None and time.monotonic() - saved_at >= self.config.checkpoint_s:
                    self._save(good)
                    saved_at = time.monotonic()
        self._finish()
        return self.history

    def _step(self, module: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, step: int, lr: float) -> float:
        """One step of training; the loss, NaN if a gradient was not finite (then no weight was changed)."""
        x, y = batch
        x = self.data.normalisation(x.to(self.device, memory_format=self.format))
        y = None if y is None else y.to(self.device)
        positions, view = self.feed.positions(step)
        torch.manual_seed((self.config.seed << 32) + step)  # dropout
        answers = None if self.teacher is None else self.teacher.answer(x, view, positions)
        x = self.seen(x)
        training_mode(module, self.batch_norm)
        loss = self.objective(as_outputs(module(x)), answers, y)
        hooks = self.hooks if module is self.student else Hooks()
        with torch.no_grad():
            hooks.after_forward(step, x)
        loss = hooks.penalised(loss, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.config.clip_norm)
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            return math.nan
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            hooks.after_step(step, x)
        if self.average is not None and module is self.student:
            decay = min(self.config.ema or 0.0, (1 + step) / (10 + step))
            for mean, now in zip(self.average.values(), self._weights().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now, 1 - decay)
                else:
                    mean.copy_(now)
        return value

    def _diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        return self.smoothed is not None and self.smoothed > DIVERGED * max(self.constant_loss, self.first_loss)

    def _back(self, good: dict[str, Any], loss: float) -> None:
        at = self.schedule.step
        if self.history.rollbacks >= MAX_ROLLBACKS:
            x, _ = self.data.batch(self.feed.positions(at)[0])
            check_finite(x, self.data)
            raise EdgepruneError(
                f"training diverged {MAX_ROLLBACKS + 1} times (loss {loss:g} at step {at}); "
                "expected it to settle: give a smaller learning rate"
            )
        good["lr_scale"] = self.lr_scale * 0.5
        good["history"]["rollbacks"] = self.history.rollbacks + 1
        good["history"]["notes"] = [
            *self.history.notes,
            f"diverged at step {at}: back to step {good['schedule']['step']} at half the learning rate",
        ]
        self._restore(good)

    def _record(self) -> None:
        step, steps = self.schedule.step, self.schedule.steps
        if self.smoothed is not None and (step * 100 // steps != (step - 1) * 100 // steps):
            self.history.losses.append((step, self.smoothed))
        parts = self.config.evaluations + 1
        if step < steps and step * parts // steps != (step - 1) * parts // steps:
            self._evaluate()

    def _evaluate(self) -> None:
        if self.validation is None:
            return
        begun = time.monotonic()
        accuracy = evaluate(self.student, self.validation)
        self.pace.evaluation_s = time.monotonic() - begun
        if accuracy is None:
            self.validation = None
            return
        self.history.validation.append((self.schedule.step, accuracy))
        if self.best is None or accuracy >= self.best[0]:
            self.best = (accuracy, self.schedule.step, copy.deepcopy(self._weights()))

    def _finish(self) -> None:
        if self.average is not None:
            self.student.load_state_dict(self.average)
        self.hooks.finish()
        self._evaluate()
        self.history.selected_step = self.schedule.step
        if self.best is not None and self.best[1] != self.schedule.step:
            self.history.selected_step = self.best[1]
            self.student.load_state_dict(self.best[2])
            self.hooks.finish()
        self.history.steps = self.schedule.step
        self.history.epochs = self.schedule.step / self.feed.per_epoch
        self.history.seconds = self.pace.elapsed()
        self.history.images_per_s = self.schedule.step * self.batch_size / max(self.history.seconds, 1e-9)
        if self.path is not None:
            self.optimizer.state.clear()
            self.best = self.average = None
            if self.teacher is not None:
                self.teacher.load([])
            self._save(self._state(), done=True)

    def _anchor(self) -> None:
        if self.batch_norm != "train" or not norms(self.student):
            return
        chunks = np.array_split(self.data.order(self.config.seed)[:ANCHOR_SAMPLES], ANCHOR_SAMPLES // 128)
        inputs, losses = [], []
        for positions in (c for c in chunks if len(c) > 1):
            x, y = self.data.batch(positions)
            x = x.to(self.device, memory_format=self.format)
            y = None if y is None else y.to(self.device)
            answers = None if self.teacher is None else self.teacher.ask(x)
            inputs.append(self.seen(x))
            losses.append(lambda value, t=answers, y=y: float(self.objective(as_outputs(value), t, y)))
        anchor_if_better(self.student, inputs, losses)

    # --- how long -----------------------------------------------------------------------------------------------

    def _count_steps(self) -> int:
        config = self.config
        if config.minutes is None:
            epochs = config.epochs if config.epochs is not None else 5
            steps = max(1, int(config.steps) if config.steps is not None else round(epochs * self.feed.per_epoch))
            self._remember(steps)
            return steps
        self._remember(self.feed.per_epoch)  # so that both kinds of step are measured
        asked_s, remembered_s = self._step_times()
        self._remember(self.pace.steps((asked_s + (REPEATS - 1) * remembered_s) / REPEATS, remembered_s, None))
        views = self.teacher.views if self.teacher is not None else 0
        return self.pace.steps(asked_s, remembered_s, views * self.feed.per_epoch if views else None)

    def _remember(self, steps: int) -> None:
        """Decide how many views the original's answers are kept for."""
        if self.teacher is not None:
            views = self.config.teacher_views
            if views is None:
                views = max(REPEATS, -(-steps // (self.feed.per_epoch * REPEATS)))
            self.teacher.remember(views if self.feed.augment else 1)

    def _step_times(self) -> tuple[float, float]:
        """Seconds of a step with and without asking the original, medians over a few steps on copies, or, since hooks
        belong to their student, on the student and back."""
        before = self._state() if self.hooks else None
        module = self.student if self.hooks else copy.deepcopy(self.student)
        optimizer = self.optimizer if self.hooks else optimizer_for(module, self.config)
        self.hooks.start(TIMED)
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(TIMED):
            step = i % self.feed.per_epoch
            for remembered in (False, True) if self.teacher is not None else (False,):
                if self.teacher is not None and not remembered:
                    self.teacher.load([])
                begun = time.monotonic()
                self._step(module, optimizer, self.feed.load(step).result(), step, 0.0)
                times[remembered].append(time.monotonic() - begun)
        if self.teacher is not None:
            self.teacher.load([])
        if before is not None:
            self._restore(before)
        asked = float(np.median(times[0][1:]))
        return asked, min(asked, float(np.median(times[1][1:]))) if times[1] else asked

    def _outputs(self, module: nn.Module, x: torch.Tensor) -> Outputs:
        with torch.no_grad():
            return as_outputs(module(x.to(self.device, memory_format=self.format)))

    # --- state --------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: t.detach() for name, t in self.student.state_dict().items()}

    def _state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as a copy."""
        return copy.deepcopy(
            {
                "model": self._weights(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "best": None if self.best is None else list(self.best),
                "schedule": {k: getattr(self.schedule, k) for k in ("steps", "warmup", "step", "phase")},
                "lr_scale": self.lr_scale,
                "smoothed": self.smoothed,
                "first_loss": self.first_loss,
                "history": self.history.to_dict(),
                "hooks": self.hooks.state(),
            }
        )

    def _restore(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)
        self.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.best = None if state["best"] is None else tuple(state["best"])
        self.schedule = Schedule(**state["schedule"])
        self.lr_scale, self.smoothed, self.first_loss = state["lr_scale"], state["smoothed"], state["first_loss"]
        self.history = History(**state["history"])
        self.hooks.load(state["hooks"])
        if self.teacher is not None and "teacher" in state:
            self.teacher.views = state["views"]
            self.teacher.load(state["teacher"])

    def _save(self, state: dict[str, Any], done: bool = False) -> None:
        assert self.path is not None
        extra = {"identity": self.identity, "done": done, "elapsed_s": self.pace.elapsed()}
        extra["evaluation_s"], extra["planned"] = self.pace.evaluation_s, self.pace.planned
        if self.teacher is not None:
            extra["teacher"] = self.teacher.state()
            extra["views"] = self.teacher.views
        checkpoint.save(self.path, {**state, **extra})
