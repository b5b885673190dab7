"""Layers and channels that a network can do without go, under one penalty, and no others do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_job import fingerprint

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.resconv import instrument, prepare
from edgeprune.graph.surgery import cut, remove
from edgeprune.train import adaptive as learning
from edgeprune.train.adaptive import adaptive
from edgeprune.train.channel_scales import ChannelScales, shrinking
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.learner import Lesson
from edgeprune.train.resconv import Settings

CONFIG = TrainConfig(steps=400, batch_size=16, lr=0.02, augment="none", loss="values", checkpoint_s=1e-9)
HOOK = learning.Adaptive
USELESS = {"a_in": (1, 4, 6), "c_in": (0, 3)}


class Branches(nn.Module):
    """Three residual branches; ``b`` adds nothing, and some inner channels of the other two are read by nobody."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        for name in "abc":
            setattr(self, f"{name}_in", nn.Conv2d(6, 8, 3, padding=1, bias=False))
            setattr(self, f"{name}_mid", nn.BatchNorm2d(8))
            setattr(self, f"{name}_out", nn.Conv2d(8, 6, 3, padding=1, bias=False))
            setattr(self, f"{name}_norm", nn.BatchNorm2d(6))
        self.head = nn.Linear(6 * 36, 5)
        with torch.no_grad():
            for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.weight.uniform_(0.8, 1.2)
                norm.bias.uniform_(-0.2, 0.2)
            self.stem.weight.mul_(0.3)
            for norm in (self.a_norm, self.c_norm):
                norm.weight.mul_(2)
            self.b_norm.weight.zero_()
            self.b_norm.bias.zero_()
            for name, units in USELESS.items():
                getattr(self, name.replace("in", "out")).weight[:, units] = 0
                getattr(self, name.replace("in", "mid")).weight[list(units)] = 1.0
            for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.momentum = 1.0

    def forward(self, x):
        x = self.stem(x)
        for name in "abc":
            inner = F.relu(getattr(self, f"{name}_mid")(getattr(self, f"{name}_in")(x)))
            x = x + getattr(self, f"{name}_norm")(getattr(self, f"{name}_out")(inner))
        return self.head(x.flatten(1))


def data():
    rng = np.random.default_rng(0)
    return DataSet.from_arrays(rng.normal(size=(1024, 3, 6, 6)).astype(np.float32))


WIDTHS = {"a_in": tuple(range(1, 9)), "c_in": tuple(range(1, 9))}
UNITS = {"a_in": 0.5, "c_in": 0.5}
LAYERS = {"a_norm": 2.0, "b_norm": 2.0, "c_norm": 2.0}


def price(units, layers, blocks):
    """ms of a network of 12 ms whose units and layers save so much."""
    names = dict(zip(blocks, LAYERS, strict=True))

    def latency_ms(widths, removed):
        saved = sum(layers[names[name]] for name in removed)
        return 12.0 - saved - sum(each * (8 - widths.get(name, 8)) for name, each in units.items())

    return latency_ms


class KilledError(Exception):
    pass


def lifted(kind=Branches, seed=0):
    """Outputs have no mean, so that knowing nothing costs all of the loss."""
    torch.manual_seed(seed)
    module = kind()
    with torch.no_grad():
        for _ in range(3):  # a norm's statistics are right when those before it are
            module.train()(next(data().batches(256))[0])
        module.eval()
        module.head.bias -= torch.cat([module(x) for x, _ in data().batches(64)]).mean(0)
    return lift(module, [(1, 3, 6, 6)])


def learn(monkeypatch, net, budget_ms, units=UNITS, layers=LAYERS, config=CONFIG, path=None, stop_at=None):
    """-> what was learnt, the hook that drove it."""
    hooks, original = [], HOOK

    class Kept(original):
        def __init__(self, network, student, *args):
            super().__init__(network, student, *args)
            self.student = student
            hooks.append(self)

    def progress(p):
        if p.step == stop_at:
            raise KilledError

    monkeypatch.setattr(learning, "Adaptive", Kept)
    start = prepare(net)
    latency_ms = price(units, layers, [b.name for b in find_blocks(start)])
    learned = adaptive(Lesson(start, net, data(), WIDTHS, latency_ms, budget_ms, config, path, progress))
    return learned, hooks[0]


def dead(hook):
    return {
        name: tuple(np.flatnonzero(~alive).tolist()) for name, alive in hook.channels.alive().items() if not alive.all()
    }


ALL_THAT_IS_USELESS = 12.0 - 2.0 - 5 * 0.5


@pytest.mark.parametrize("threshold", [0.0, 0.4, 2.0])
def test_the_proximal_step_is_the_minimum_it_stands_for(threshold):
    """argmin over u of ||u - w||^2 / 2 + threshold * ||u||, by looking at all u of a plane."""
    line = torch.linspace(-2, 2, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    for w in ([0.9, -1.2], [0.3, 0.1], [0.0, 0.7]):
        w = torch.tensor(w, dtype=torch.float64)
        best = grid[((grid - w).square().sum(1) / 2 + threshold * grid.norm(dim=1)).argmin()]
        torch.testing.assert_close(shrinking(w.norm(), threshold) * w, best, rtol=0, atol=5e-3)
    assert shrinking(torch.tensor([0.4, 0.0]), 0.4).tolist() == [0.0, 0.0]


def hook_of(net, budget_ms, units=UNITS, layers=LAYERS, widths=WIDTHS, settings=None):
    """-> a hook at the start of a run, its student."""
    network = instrument(prepare(net))
    student = network.copy()
    latency_ms = price(units, layers, [b.name for b in find_blocks(network)])
    hook = learning.Adaptive(network, student, widths, latency_ms, budget_ms, CONFIG, settings=settings)
    hook.start(CONFIG.steps)
    return hook, student


def descend(hook, worth, useless=USELESS, idle=(1,), steps=CONFIG.steps):
    """Gradient descent on a loss of which all is known: ``worth / 2`` times the squared distance from the start, summed
    over factors and over scales relative to their group's, but for what is useless."""
    x, starts = torch.zeros(1), [group.scales[0].leaf.weight.clone() for group in hook.channels.groups]
    with torch.no_grad():
        for step in range(steps):
            rate = hook._rate(step) * worth
            for i, lam in enumerate(hook.lams):
                lam.add_(0.0 if i in idle else rate * (1 - lam))
            for group, start in zip(hook.channels.groups, starts, strict=True):
                weight = group.scales[0].leaf.weight
                step_of_all = rate * (start - weight) / group.reference**2
                step_of_all[list(useless.get(group.name, ()))] = 0.0
                weight.add_(step_of_all)
            hook.after_step(step, x)


def test_what_is_useless_goes_and_nothing_else():
    """All that is useless together is what the budget asks for; the rest is worth more than any price."""
    hook, student = hook_of(lifted(), ALL_THAT_IS_USELESS)
    descend(hook, worth=4.0)
    assert dead(hook) == USELESS
    assert [lam.item() == 0.0 for lam in hook.lams] == [False, True, False]
    assert hook.enough
    for name, units in USELESS.items():
        norm = student.module.get_submodule(name.replace("in", "mid"))
        assert not norm.weight[list(units)].any()
        assert not norm.bias[list(units)].any()
        assert (norm.weight != 0).sum() == 8 - len(units)
    assert min(lam.item() for i, lam in enumerate(hook.lams) if i != 1) > 0.9  # the penalty ended


@pytest.mark.parametrize("dear", ["a_in", "c_in"])
def test_of_two_useless_channels_the_dearer_goes_first(dear):
    hook, _ = hook_of(lifted(), 11.5, {**UNITS, dear: 0.7})
    descend(hook, worth=4.0, idle=())
    assert set(dead(hook)) == {dear}
    assert set(dead(hook)[dear]) <= set(USELESS[dear])


@pytest.mark.parametrize(("layer_ms", "first"), [(0.3, "channel"), (8.0, "layer")])
def test_layers_and_channels_compete_for_the_same_milliseconds(layer_ms, first):
    """A layer and a channel, both useless: whichever saves more for its size goes first."""
    hook, _ = hook_of(lifted(), 11.9, layers={**LAYERS, "b_norm": layer_ms})
    descend(hook, worth=4.0)
    assert bool(hook.removed()) == (first == "layer")
    assert bool(dead(hook)) == (first == "channel")


def test_as_many_as_the_narrowest_width_always_live():
    hook, _ = hook_of(lifted(), 0.0, widths={"a_in": (4, 8), "c_in": (8,)})
    descend(hook, worth=0.0, idle=(0, 1, 2))
    assert hook.channels.widths() == {"stem": 6, "a_in": 4, "b_in": 8, "c_in": 8}
    assert len(hook.removed()) == 3


def test_growing_weights_do_not_make_up_for_scales():
    hook, student = hook_of(lifted(), 0.0)
    with torch.no_grad():
        for name in ("a_in", "a_mid", "a_out", "head"):
            student.module.get_submodule(name).weight.mul_(1.5)
        hook.hold()
    before = lifted().module
    for name, unit_dims in (("a_in", (1, 2, 3)), ("a_out", (0, 2, 3))):
        now, then = (m.get_submodule(name).weight.square().sum(unit_dims) for m in (student.module, before))
        torch.testing.assert_close(now, then)
    torch.testing.assert_close(student.module.get_submodule("a_mid").weight, before.get_submodule("a_mid").weight)
    torch.testing.assert_close(student.module.get_submodule("head").weight, before.get_submodule("head").weight)


def quickly(monkeypatch):
    """A penalty under which much dies in a few steps; what goes does not matter."""
    monkeypatch.setattr(learning, "SETTINGS", Settings(first=0.5, last=5.0, most=1.0))
    return replace(CONFIG, steps=60, lr=0.01)


def test_cutting_what_is_dead_changes_nothing(monkeypatch):
    learned, hook = learn(monkeypatch, lifted(), 8.0, config=quickly(monkeypatch))
    alive = hook.channels.alive()
    assert dead(hook)
    assert hook.enough
    assert hook.predicted_ms() <= 8.0
    assert learned.rankings == {}
    x = learned.network.random_inputs(8)
    with torch.no_grad():
        now = learned.network.module(*x)
        trained = hook.student.module.eval()(*x)
        torch.testing.assert_close(now, trained, rtol=1e-4, atol=1e-4)
        keep = {name: tuple(np.flatnonzero(units)) for name, units in alive.items()}
        narrow = cut(learned.network, analyse(learned.network), keep)
        torch.testing.assert_close(narrow.module(*x), now, rtol=1e-4, atol=1e-5)
        gone = [b for b in find_blocks(learned.network) if b.name in hook.removed()]
        torch.testing.assert_close(remove(learned.network, gone).module(*x), now, rtol=1e-4, atol=1e-5)
    for name in dead(hook):  # ready to be woken where a plan keeps them
        assert learned.network.module.get_submodule(name.replace("in", "mid")).weight.all()
    assert "units of channels came to zero" in learned.history.notes[-1]


def test_a_killed_run_goes_on(monkeypatch, tmp_path):
    config = quickly(monkeypatch)
    whole, first = learn(monkeypatch, lifted(), 8.0, config=config)
    with pytest.raises(KilledError):
        learn(monkeypatch, lifted(), 8.0, config=config, path=tmp_path / "run.pt", stop_at=30)
    again, second = learn(monkeypatch, lifted(), 8.0, config=config, path=tmp_path / "run.pt")
    assert again.history.resumed_from == 20
    assert fingerprint(again.network.module) == fingerprint(whole.network.module)
    assert (dead(first), first.removed()) == (dead(second), second.removed())


def test_an_average_does_not_bring_the_dead_back(monkeypatch):
    config = replace(quickly(monkeypatch), ema=0.9)
    _, hook = learn(monkeypatch, lifted(), 8.0, config=config)
    assert dead(hook)
    for group in hook.channels.groups:
        for weights in group.readers:
            assert not weights.energy()[~group.alive].any()


class Bare(nn.Module):
    """No batch norm; one group goes through a norm over channels."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 36, 3)

    def forward(self, x):
        x = self.two(F.relu(self.one(x))).permute(0, 2, 3, 1)
        return self.head(F.layer_norm(x, (6,)).flatten(1))


def test_without_batch_norms_filters_are_the_scales():
    network = prepare(lifted(Bare))
    widths = {"one": (2, 8), "two": (2, 6)}
    channels = ChannelScales(network, network.copy(), widths, lambda widths, _: sum(widths.values()))
    (one,) = [group for group in channels.groups if group.floor < group.size]
    assert (one.name, one.floor) == ("one", 2)
    torch.testing.assert_close(
        one.scales[0].energy(), network.module.get_submodule("one").weight.square().sum((1, 2, 3))
    )
    assert channels.weights()


def test_nothing_that_can_go_is_an_error(monkeypatch):
    monkeypatch.setitem(WIDTHS, "a_in", (8,))
    net = lift(nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Linear(8, 5)).eval(), [(1, 3, 6, 6)])
    with pytest.raises(UnsupportedModelError, match="no group of channels has both"):
        adaptive(Lesson(net, net, data(), {}, lambda widths, removed: 1.0, 0.5, replace(CONFIG, steps=2)))
