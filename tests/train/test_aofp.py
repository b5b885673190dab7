"""AOFP beside real training: what it prunes, that it disturbs nothing, and that it can be killed."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from training_job import fingerprint

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import cut
from edgeprune.train.aofp import Aofp, Settings, aofp
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.finetune import finetune
from edgeprune.train.halving import Move
from edgeprune.train.learner import Lesson
from edgeprune.train.pace import Pace

QUICK = {"batch_size": 16, "lr": 0.05, "augment": "none"}


class KilledError(Exception):
    pass


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.1)]
    return lift(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).eval(), [(1, 3, 8, 8)])


def samples(count=64):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 3, 8, 8)).astype(np.float32)
    x[np.arange(count), y] += 1.5
    return DataSet.from_arrays(x, y)


SIZES = {"0": 8, "3": 12}
EVERY = {name: tuple(range(1, size + 1)) for name, size in SIZES.items()}


def work(widths, removed=()):
    """Multiply-adds of the two convolutions, in units that make the whole network 1."""
    a, b = ({**SIZES, **widths}[name] for name in SIZES)
    return (3 * a * 64 + a * b * 9) / (3 * 8 * 64 + 8 * 12 * 9)


class Fixed(Aofp):
    """The threshold stays as it is."""

    def _raise(self, missing_ms):
        pass


def steps(hook, student, x, count):
    """Rounds of scoring on one batch, with weights that stay as they are."""
    hook.start(0)
    student.module.train()
    with hook.attached(), torch.no_grad():
        for step in range(count):
            student.module(x)
            hook.after_forward(step, x)
            hook.after_step(step, x)


def frozen(settings, widths=EVERY, kind=Fixed, dead=(), count=12, budget=0.0):
    student = network().copy()
    with torch.no_grad():
        for unit in dead:
            student.module.get_submodule("3").weight[:, unit] = 0
    hook = kind(student, widths, work, budget, settings=settings)
    steps(hook, student, torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)), count)
    return hook


def test_no_threshold_takes_only_what_does_no_damage_at_all():
    hook = frozen(Settings(theta=0.0), dead=(2, 5), count=40)
    assert sorted(u for move in hook.searches["0"].moves for u in move.units) == [2, 5]
    assert not hook.searches["3"].moves


def test_a_dead_filter_goes_first():
    hook = frozen(Settings(theta=0.02), dead=(5,), count=40)
    assert hook.searches["0"].moves[0].units[0] == 5


def test_a_boundless_threshold_halves_every_group():
    hook = frozen(Settings(theta=math.inf, draws=16), count=6)
    assert hook.widths() == {"0": 4, "3": 6}
    assert [len(s.moves) for s in hook.searches.values()] == [1, 1]
    hook = frozen(Settings(theta=math.inf, draws=16), count=60)
    assert hook.widths() == {"0": 1, "3": 1}
    assert hook.done()


def test_scoring_changes_no_bit_of_the_training():
    """Loss, gradients, running statistics and dropout: with the scoring pass on, the run ends with the same weights.
    In both groups a unit is masked already."""
    ends = []
    for scored, masked in ((False, True), (True, True), (False, False)):
        student = network().copy()
        hook = Fixed(student, EVERY, work, 0.0, settings=Settings(theta=-1.0))
        for search, unit in zip(hook.searches.values(), (2, 5) if masked else (), strict=False):
            search.waiting = Move((unit,), 0.0)
            search.accept()
        hook._settle()
        with hook.attached():
            history = finetune(
                student.module,
                network().module,
                samples(),
                TrainConfig(steps=12, **QUICK),
                hooks=[hook] if scored else [],
            )
        ends.append((fingerprint(student.module), history.losses))
        assert all(s.refused for s in hook.searches.values()) == scored
        assert hook.widths() == ({"0": 7, "3": 11} if masked else SIZES)
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]


def lesson(budget, widths=EVERY, dearer=1.0, steps=80, **kwargs):
    config = TrainConfig(steps=steps, checkpoint_s=1e-9, **QUICK)

    def price(widths, removed=()):
        return dearer * work(widths, removed)

    return Lesson(network(), network(), samples(), widths, price, dearer * budget, config, **kwargs)


def test_the_budget_is_reached_and_cutting_changes_nothing():
    learned = aofp(lesson(0.5))
    assert "aofp: " in learned.history.notes[-1]
    assert learned.history.steps < 80
    convolution, linear = (learned.network.module.get_submodule(name).weight for name in ("3", "9"))
    read = {"0": convolution.detach().abs().sum((0, 2, 3)) > 0, "3": linear.detach().abs().sum(0) > 0}
    widths = {name: int(units.sum()) for name, units in read.items()}
    assert 0.2 < work(widths) <= 0.5
    keep = {name: ranking.keep(widths[name]) for name, ranking in learned.rankings.items()}
    for name, units in read.items():
        assert keep[name] == tuple(np.flatnonzero(units))
    narrow = cut(learned.network, analyse(learned.network), keep)
    assert narrow.module.get_submodule("3").weight.shape[:2] == (widths["3"], widths["0"])
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(narrow.module(x), learned.network.module(x), rtol=1e-4, atol=1e-5)
        assert (network().module(x) - learned.network.module(x)).abs().max() > 0.01
    # one more channel than at the end does no harm either
    wider = {name: ranking.keep(min(widths[name] + 1, SIZES[name])) for name, ranking in learned.rankings.items()}
    with torch.no_grad():
        back = cut(learned.network, analyse(learned.network), wider).module(x)
        torch.testing.assert_close(back, learned.network.module(x), rtol=1e-4, atol=1e-5)


def test_a_killed_search_ends_with_the_same_bits(tmp_path):
    whole = aofp(lesson(0.5))

    def stop(p):
        if p.step == 23:
            raise KilledError

    with pytest.raises(KilledError):
        aofp(lesson(0.5, checkpoint=tmp_path / "search.pt", progress=stop))
    fewer = {**EVERY, "0": EVERY["0"][1:]}  # the next process finds other prices and other edges of the stairs
    again = aofp(lesson(0.5, fewer, 1.003, checkpoint=tmp_path / "search.pt"))
    assert again.history.resumed_from == 20
    assert fingerprint(again.network.module) == fingerprint(whole.network.module)
    for name, ranking in whole.rankings.items():
        np.testing.assert_array_equal(again.rankings[name].order, ranking.order)
        np.testing.assert_array_equal(again.rankings[name].damage, ranking.damage)


@pytest.mark.parametrize("at", [20, 220])
def test_a_run_that_is_shortened_reaches_the_budget_in_the_steps_it_gets(monkeypatch, at):
    """Planned at a pace that would have got it there at step 480 of 600."""

    def shorten(self, schedule, notes):
        if schedule.step == at:
            schedule.steps = at + 60

    monkeypatch.setattr(Pace, "keep_within_limit", shorten)
    learned = aofp(lesson(0.4, steps=600))
    assert at < learned.history.steps <= at + 60
    convolution, linear = (learned.network.module.get_submodule(name).weight.detach().abs() for name in ("3", "9"))
    assert work({"0": int((convolution.sum((0, 2, 3)) > 0).sum()), "3": int((linear.sum(0) > 0).sum())}) <= 0.4


def test_what_was_to_come_is_spread_over_the_steps_that_are_left():
    hook = Fixed(network().copy(), EVERY, work, 0.3, settings=Settings(warmup=0.1, rounds=9))
    hook.start(1000)
    hook.shorten(40, 520)  # half of what was left
    assert (hook.first, hook.began[0], hook.period, hook.steps) == (70, 70, 50, 520)
    assert not hook.ablation.watching
    hook.began = (170, 0.8)
    hook.shorten(220, 260)  # 40 steps instead of 300
    assert (hook.first, hook.began, hook.steps) == (70, (170, 0.8), 260)
    assert hook.period == pytest.approx(50 * 40 / 300)
    assert hook.ablation.watching


def waiting(steps=1, **moves):
    """A hook at the start of a run of so many steps whose groups wait with moves of (units, damage)."""
    hook = Fixed(network().copy(), EVERY, work, 0.3, settings=Settings(end=1.0, warmup=0.0))
    hook.start(steps)
    for name, (units, damage) in moves.items():
        hook.searches[name[1:]].waiting = Move(tuple(range(units)), damage)
    return hook


def test_of_several_moves_the_cheapest_per_millisecond_is_taken():
    gains = {"g0": 1 - work({"0": 4}), "g3": 1 - work({"3": 6})}
    damages = {"g0": 0.002 * gains["g0"], "g3": 0.001 * gains["g3"]}
    for worse in (1.0, 4.0):
        hook = waiting(1000, g0=(4, damages["g0"]), g3=(6, worse * damages["g3"]))
        hook._end_cycle(9)  # 100 cycles of 10 steps: one move is more than enough for one of them
        assert hook.widths() == ({"0": 8, "3": 6} if worse == 1.0 else {"0": 4, "3": 12})
        assert not any(s.waiting or s.count.any() for s in hook.searches.values())  # the other one looks anew
        assert hook.began == (10, work(hook.widths()))


def test_with_little_time_left_all_moves_are_taken():
    hook = waiting(1000, g0=(4, 0.01), g3=(3, 0.001))
    hook._end_cycle(990)
    assert hook.widths() == {"0": 4, "3": 9}


def test_a_move_that_is_no_faster_is_not_taken():
    hook = waiting(g0=(4, 0.001))
    hook.latency_ms = lambda widths, removed: 1.0 + (widths["0"] < 8)
    hook._settle()
    assert hook._cheapest() is None
    assert hook.widths() == SIZES
    assert hook.searches["0"].waiting is None


def test_enough_is_enough():
    """The second move would do too much: only as much of it is taken as leads to the budget, or none of it."""
    hook = waiting(g0=(4, 0.001), g3=(6, 0.01))
    hook.budget_ms = work({"0": 4})
    hook._settle()
    hook._end_cycle(0)
    assert hook.widths() == {"0": 4, "3": 12}
    assert hook.done()
    hook = waiting(g0=(4, 0.001), g3=(6, 0.01))
    hook.budget_ms = work({"0": 4, "3": 10})
    hook._settle()
    hook._end_cycle(0)
    assert hook.widths() == {"0": 4, "3": 10}
    assert hook.done()


def looked_in_vain(damages):
    """A hook at the start of a run of 1 000 steps whose groups were refused moves of these damages."""
    hook = Aofp(network().copy(), EVERY, work, 0.3, settings=Settings(theta=0.01, growth=2.0, end=1.0, warmup=0.0))
    hook.start(1000)
    for name, refused in zip(SIZES, damages, strict=True):
        hook.searches[name].refused, hook.searches[name].looked = refused, True
    return hook


def test_the_threshold_rises_only_when_all_have_looked():
    hook = looked_in_vain(({4: 0.05}, {6: 0.3, 9: 0.2}))
    x = torch.randn(4, 3, 8, 8)
    hook.searches["3"].looked = False
    hook.after_step(99, x)
    assert hook.theta == 0.01
    hook.searches["3"].looked = True
    hook.after_step(99, x)  # 100 steps a cycle, 10 of them for 0.7 ms: the cheapest refused move brings enough
    assert hook.theta == 0.05
    assert not any(s.looked for s in hook.searches.values())
    assert hook.began == (100, 1.0)


def test_the_threshold_stays_while_moves_keep_the_pace():
    for units, raised in ((1, True), (2, False)):  # 1/12 and 2/12 of the way in one of ten cycles
        hook = looked_in_vain(({4: 0.05}, {6: 0.3, 9: 0.2}))
        hook.latency_ms = lambda widths, removed: 0.3 + 0.7 * (widths["0"] / 12 + 4 / 12 + (widths["3"] - 12) / 100)
        hook._settle()
        hook.began = (0, hook.now_ms)
        hook.searches["0"].waiting = Move(tuple(range(units)), 0.001)
        hook._end_cycle(99)
        assert hook.widths()["0"] == 8 - units
        assert (hook.theta > 0.01) == raised


def test_with_little_time_left_it_rises_further():
    hook = looked_in_vain(({4: 0.05}, {6: 0.3, 9: 0.2}))
    hook._end_cycle(995)
    assert hook.theta == 0.2
    hook = looked_in_vain(({4: math.inf}, {}))
    hook._end_cycle(998)
    assert hook.theta == 0.02  # nothing to go by


def test_groups_begin_one_after_the_other():
    student = network().copy()
    hook = Fixed(student, EVERY, work, 0.0, settings=Settings(theta=-1.0, draws=8, warmup=0.1, rounds=5))
    hook.start(100)
    assert (hook.first, hook.period) == (10, 18)
    begun = {}
    x = torch.randn(16, 3, 8, 8)
    student.module.train()
    with hook.attached(), torch.no_grad():
        for step in range(25):
            student.module(x)
            hook.after_forward(step, x)
            hook.after_step(step, x)
            for name, search in hook.searches.items():
                if search.batches:
                    begun.setdefault(name, step)
    assert begun == {"0": 10, "3": 19}


def test_other_settings_are_another_search():
    usual = {"widths": EVERY, "budget_ms": 0.3, "seed": 0, "settings": None}
    others = {"widths": {"0": EVERY["0"]}, "seed": 1, "settings": Settings(theta=0.02)}
    student = network()
    keys = [
        Aofp(student, latency_ms=work, **{**usual, **change}).key()
        for change in ({}, {}, *({name: value} for name, value in others.items()))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
