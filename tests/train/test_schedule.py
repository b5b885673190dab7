"""The learning rate over a run, and how many steps fit into a time."""

import numpy as np
import pytest

from edgeprune.train.schedule import RESERVE, Schedule, steps_within


def factors(schedule, shorten=None):
    result = []
    while not schedule.done:
        if shorten and schedule.step == shorten[0]:
            schedule.steps = shorten[1]
        result.append(schedule.factor())
        schedule.advance()
    return np.array(result)


def test_rises_then_falls_to_zero():
    f = factors(Schedule(200, 0.1))
    assert len(f) == 200
    assert f.argmax() in (19, 20)
    assert (np.diff(f[:20]) > 0).all()
    assert (np.diff(f[20:]) < 0).all()
    assert 0.99 < f.max() <= 1
    assert 0 < f[-1] < 1e-3


@pytest.mark.parametrize("at", [10, 80, 150, 198])
def test_a_shortened_run_still_ends_at_zero(at):
    steps = at + 1 + (200 - at) // 3
    f = factors(Schedule(200, 0.1), (at, steps))
    assert len(f) == steps
    assert f[-1] < 0.2 if at == 198 else f[-1] < 0.01
    np.testing.assert_allclose(f[:at], factors(Schedule(200, 0.1))[:at])
    if at >= 80:
        assert (np.diff(f[at:]) < 0).all()


def test_no_warmup_and_a_single_step():
    assert factors(Schedule(50, 0.0))[0] > 0.99
    assert 0 < factors(Schedule(1, 0.1))[0] <= 1


@pytest.mark.parametrize(
    ("seconds", "asked_s", "remembered_s", "asked_steps", "expected"),
    [
        (100, 1.0, 0.5, None, 100 * (1 - RESERVE)),
        (100, 1.0, 0.5, 40, 40 + (100 * (1 - RESERVE) - 40) / 0.5),
        (30, 1.0, 0.5, 40, 30 * (1 - RESERVE)),
        (0.1, 1.0, 0.5, 40, 1),
        (-5, 1.0, 0.5, 40, 1),
    ],
)
def test_steps_within(seconds, asked_s, remembered_s, asked_steps, expected):
    assert steps_within(seconds, asked_s, remembered_s, asked_steps) == int(expected)
