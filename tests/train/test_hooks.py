"""Hooks: called in order, part of the loss and of the step, and of what a killed or diverged run goes back to."""

import pytest
import torch
from training_job import fingerprint, network, samples

from edgeprune.errors import UsageError
from edgeprune.train import pace
from edgeprune.train.config import TrainConfig
from edgeprune.train.finetune import finetune
from edgeprune.train.hooks import Hook

QUICK = {"batch_size": 16, "lr": 0.05, "augment": "none"}
CONFIG = TrainConfig(steps=50, checkpoint_s=1e-9, **QUICK)


class KilledError(Exception):
    pass


class Recorder(Hook):
    """Counts in its state what it sees; nothing of it touches the run."""

    def __init__(self):
        self.calls, self.seen, self.steps, self.shortened = [], 0, 0, []

    def start(self, steps):
        self.steps = steps

    def shorten(self, step, steps):
        self.shortened.append((step, steps))
        self.steps = steps

    def after_forward(self, step, x):
        self.calls.append(("forward", step, len(x)))

    def penalty(self, step):
        self.calls.append(("penalty", step))

    def after_step(self, step, x):
        self.calls.append(("step", step))
        self.seen += step

    def state(self):
        return {"seen": self.seen, "steps": self.steps}

    def load(self, state):
        self.seen, self.steps = state["seen"], state["steps"]


class Pull(Hook):
    """Pulls the first weight to zero by a penalty that grows, and holds its first filter at zero."""

    def __init__(self, student, strength=0.1, fails_at=None):
        self.weight, self.strength, self.fails_at, self.grown = student[0].weight, strength, fails_at, 0.0

    def key(self):
        return f"pull {self.strength}"

    def penalty(self, step):
        if step == self.fails_at:
            self.fails_at = None
            return self.weight.sum() * torch.inf
        return self.grown * self.weight.square().sum()

    def after_step(self, step, x):
        self.grown += self.strength
        self.weight[0] = 0

    def state(self):
        return {"grown": self.grown}

    def load(self, state):
        self.grown = state["grown"]


def train(hooks, path=None, stop_at=None, config=CONFIG, data=None):
    student = network(6, 1)
    made = hooks(student)

    def progress(p):
        if p.step == stop_at:
            raise KilledError

    history = finetune(student, network(12, 0), data or samples(64, 0), config, path, progress, hooks=made)
    return student, made, history


def test_the_order_of_calls():
    _, (hook,), _ = train(lambda student: [Recorder()], config=TrainConfig(steps=2, **QUICK))
    assert hook.calls == [
        ("forward", 0, 16), ("penalty", 0), ("step", 0), ("forward", 1, 16), ("penalty", 1), ("step", 1)
    ]  # fmt: skip
    assert (hook.seen, hook.steps) == (1, 2)


def test_a_hook_that_does_nothing_changes_no_bit():
    without, _, _ = train(lambda student: [])
    watched, _, _ = train(lambda student: [Recorder(), Hook()])
    assert fingerprint(without) == fingerprint(watched)


def test_penalties_and_steps_act():
    plain, _, _ = train(lambda student: [])
    pulled, _, _ = train(lambda student: [Pull(student)])
    assert pulled[0].weight[1:].norm() < 0.5 * plain[0].weight[1:].norm()
    assert not pulled[0].weight[0].any()
    assert plain[0].weight[0].any()


@pytest.mark.parametrize("stop_at", [7, 33])
def test_a_killed_run_goes_on_with_the_hooks_state(tmp_path, stop_at):
    whole, (_, recorder), _ = train(lambda student: [Pull(student), Recorder()])
    with pytest.raises(KilledError):
        train(lambda student: [Pull(student), Recorder()], tmp_path / "run.pt", stop_at)
    resumed, (_, again), history = train(lambda student: [Pull(student), Recorder()], tmp_path / "run.pt")
    assert history.resumed_from == stop_at // 20 * 20
    assert fingerprint(resumed) == fingerprint(whole)
    assert (again.seen, again.steps) == (recorder.seen, recorder.steps) == (sum(range(50)), 50)


def test_a_diverged_run_goes_back_with_the_hooks_state():
    _, (pull, recorder), history = train(lambda student: [Pull(student, fails_at=37), Recorder()])
    assert history.rollbacks == 1
    assert [c[1] for c in recorder.calls if c[0] == "forward"] == [*range(38), *range(20, 50)]
    assert recorder.seen == sum(range(50))
    assert pull.grown == pytest.approx(0.1 * 50)


def test_hooks_follow_a_run_that_is_shortened(tmp_path, monkeypatch):
    """One that is killed later knows it from its checkpoint."""

    def shorten(self, schedule, notes):
        if schedule.step == 20:
            schedule.steps = 44

    monkeypatch.setattr(pace.Pace, "keep_within_limit", shorten)
    _, (hook,), history = train(lambda student: [Recorder()])
    assert (hook.shortened, hook.steps, history.steps) == ([(20, 44)], 44, 44)
    with pytest.raises(KilledError):
        train(lambda student: [Recorder()], tmp_path / "run.pt", 33)
    _, (again,), history = train(lambda student: [Recorder()], tmp_path / "run.pt")
    assert (again.shortened, again.steps, history.resumed_from, history.steps) == ([], 44, 20, 44)


def test_a_hook_ends_the_run(tmp_path):
    class Enough(Recorder):
        def done(self):
            return self.seen >= 10

    student, _, history = train(lambda student: [Enough()], tmp_path / "run.pt")
    assert history.steps == 5
    again, (hook,), repeated = train(lambda student: [Enough()], tmp_path / "run.pt")
    assert (repeated.steps, repeated.resumed_from, hook.seen, hook.calls) == (5, 5, 10, [])
    assert fingerprint(again) == fingerprint(student)


def test_other_settings_are_another_run(tmp_path):
    train(lambda student: [Pull(student)], tmp_path / "run.pt")
    with pytest.raises(UsageError, match="other settings"):
        train(lambda student: [Pull(student, 0.2)], tmp_path / "run.pt")
    with pytest.raises(UsageError, match="other settings"):
        train(lambda student: [], tmp_path / "run.pt")


def test_timing_the_steps_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(pace, "TOLERANCE", 1e6)  # a busy machine would shorten the run
    config = TrainConfig(minutes=0.02, **QUICK)
    student, (_, recorder), history = train(lambda student: [Pull(student), Recorder()], config=config)
    exact = TrainConfig(steps=history.steps, **QUICK)
    same, (_, other), _ = train(lambda student: [Pull(student), Recorder()], config=exact)
    assert recorder.seen == other.seen == sum(range(history.steps))
    assert fingerprint(same) == fingerprint(student)
