"""kill -9 in the middle, the same command again: it goes on where it was and ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_job import network, run, samples

from edgeprune.errors import UsageError
from edgeprune.train.config import TrainConfig
from edgeprune.train.finetune import finetune
from edgeprune.train.pace import Pace

JOB = Path(__file__).with_name("training_job.py")
LENGTHLESS = {"ema": 0.9, "augment": "crop", "teacher_views": 3, "label_weight": 0.3}
SETTINGS = {**LENGTHLESS, "epochs": 8}


def start(folder, settings):
    arguments = [sys.executable, str(JOB), str(folder / "run.pt"), str(folder / "run.json"), json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def finish(folder, settings):
    with start(folder, settings) as process:
        process.communicate(timeout=100)
    assert process.returncode == 0
    return json.loads((folder / "run.json").read_text())


def kill_at(folder, settings, step):
    """Start, and kill -9 once so many steps were reported; -> the number of steps that the run has."""
    with start(folder, {**settings, "pause_s": 0.01}) as process:
        for line in process.stdout:
            done, steps = (int(n) for n in line.split())
            if done >= step:
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return steps


def assert_same(a, b):
    keys = ("fingerprint", "losses", "validation", "selected_step", "steps", "rollbacks")
    a, b = (json.dumps([doc[k] for k in keys]) for doc in (a, b))
    assert a == b


def test_killed_twice_ends_with_the_same_bits(tmp_path):
    whole = run(tmp_path / "whole.pt", SETTINGS)
    assert (whole["steps"], whole["resumed_from"]) == (96, 0)
    kill_at(tmp_path, SETTINGS, 29)
    with pytest.raises(UsageError, match="other settings"):  # another command does not go on with it
        run(tmp_path / "run.pt", {**SETTINGS, "lr": 0.01})
    kill_at(tmp_path, SETTINGS, 68)
    resumed = finish(tmp_path, SETTINGS)
    assert resumed["resumed_from"] in (60, 80)
    assert_same(resumed, whole)
    again = run(tmp_path / "run.pt", SETTINGS)  # a finished run is not repeated
    assert again["resumed_from"] == 96
    assert_same(again, whole)


def test_killed_under_a_time_limit_keeps_its_number_of_steps(tmp_path):
    """Whatever the next process would find to fit."""
    settings = {**LENGTHLESS, "minutes": 5}
    assert kill_at(tmp_path, {**settings, "fitting": 90}, 50) == 90
    assert torch.load(tmp_path / "run.pt", weights_only=True)["schedule"]["steps"] == 90
    resumed = finish(tmp_path, {**settings, "fitting": 70})
    assert resumed["resumed_from"] >= 20
    assert_same(resumed, run(tmp_path / "whole.pt", {**LENGTHLESS, "steps": 90}))


def test_a_resumed_run_still_knows_what_was_planned(tmp_path, monkeypatch):
    """120 steps of half a second that turn out to take one, and after the interruption two; the limit is 60 s."""
    spent, step_s = [], 1.0
    monkeypatch.setattr(Pace, "steps", lambda self, *_: 120)
    monkeypatch.setattr(Pace, "took", lambda self, _: spent.append(step_s))
    monkeypatch.setattr(Pace, "elapsed", lambda self: self.before + sum(spent))
    monkeypatch.setattr(Pace, "left_s", lambda self, schedule: (schedule.steps - schedule.step) * step_s)
    config = TrainConfig(minutes=1, batch_size=16, augment="none", checkpoint_s=0)

    def job(progress):
        return finetune(network(6, 1), network(12, 0), samples(64, 0), config, tmp_path / "run.pt", progress)

    def stop(p):
        if p.step == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(stop)
    spent, step_s = [], 2.0
    history = job(None)
    assert (history.resumed_from, history.steps) == (20, 41)
    assert [n for n in history.notes if "slower" in n] == [
        "the machine became slower than measured: 41 steps instead of 120"
    ]
