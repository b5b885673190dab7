"""Layers that a network can do without lose their factors, and no others do."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_job import fingerprint

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.lift import lift
from edgeprune.graph.resconv import absorb_factors, instrument
from edgeprune.graph.surgery import remove
from edgeprune.train import resconv as learning
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.learner import Lesson
from edgeprune.train.resconv import resconv, shrunk

CONFIG = TrainConfig(steps=120, batch_size=16, augment="none", loss="values", checkpoint_s=1e-9)


class Plain(nn.Module):
    """Three layers that could go. ``idle`` does what its shortcut could do; the others are random."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.idle = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.last, self.last_norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 9, 5)
        for layer in (self.stem, self.first, self.last):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.dirac_(self.idle.weight)

    def forward(self, x):
        x = F.relu(self.norm(self.first(F.relu(self.stem(x)))))
        x = F.relu(self.last_norm(self.last(F.relu(self.idle(x)))))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Branches(nn.Module):
    """Residual branches, two of which add nothing."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        for i in (1, 2):
            nn.init.zeros_(self.norms[i].weight)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(x + norm(conv(x)))
        return x.mean((2, 3))


def data():
    rng = np.random.default_rng(0)
    return DataSet.from_arrays(rng.normal(size=(128, 3, 6, 6)).astype(np.float32))


class KilledError(Exception):
    pass


def learn(net, monkeypatch, budget_ms=8.0, saves=lambda name: 2.0, config=CONFIG, path=None, stop_at=None):
    """-> the lesson's network, what was learnt, and the hook that drove it."""
    start = absorb_factors(instrument(net))
    hooks = []

    class Kept(learning.LayerFactors):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            hooks.append(self)

    def progress(p):
        if p.step == stop_at:
            raise KilledError

    monkeypatch.setattr(learning, "LayerFactors", Kept)
    latency_ms = lambda widths, removed: 10.0 - sum(map(saves, removed))  # noqa: E731
    learned = resconv(Lesson(start, net, data(), {}, latency_ms, budget_ms, config, path, progress))
    return start, learned, hooks[0]


def lifted(kind, seed=0):
    torch.manual_seed(seed)
    return lift(kind().eval(), [(1, 3, 6, 6)])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
def test_the_proximal_step_is_the_minimum_it_stands_for(threshold):
    """argmin_u (u - lam)^2 / 2 + threshold * |u|, by looking at all u."""
    grid = torch.linspace(-3, 3, 60001)
    for lam in (-1.7, -0.3, 0.0, 0.1, 0.9):
        best = grid[((grid - lam).square() / 2 + threshold * grid.abs()).argmin()]
        assert shrunk(torch.tensor(lam), threshold).item() == pytest.approx(best.item(), abs=2e-4)
    assert shrunk(torch.tensor(0.29), 0.3).item() == 0.0


def test_the_layer_that_is_not_needed_goes_and_no_other(monkeypatch):
    net = lifted(Plain)
    start, learned, hook = learn(net, monkeypatch)
    factors = {f.block: lam.item() for f, lam in zip(hook.factors, hook.lams, strict=True)}
    assert factors["idle"] == 0.0
    assert min(factors["first"], factors["last"]) > 0.3
    assert hook.removed() == learned.removed == ("idle",)
    assert "1 of 3" in learned.history.notes[-1]

    assert [n.name for n in learned.network.module.graph.nodes] == [n.name for n in start.module.graph.nodes]
    assert learned.network.module.state_dict().keys() == start.module.state_dict().keys()
    assert not learned.network.module.get_parameter("idle.weight").any()
    x = net.random_inputs(8)
    with torch.no_grad():
        now = learned.network.module(*x)
        block = next(b for b in find_blocks(learned.network) if b.name == "idle")
        without = remove(learned.network, [block]).module(*x)
    assert torch.equal(without, now)
    assert learned.history.losses[-1][1] < 0.3  # squared error relative to the original's outputs


def test_scales_do_not_make_up_for_factors(monkeypatch):
    _, _, hook = learn(lifted(Plain), monkeypatch)
    for leaf, scale in zip(hook.leaves, hook.scales, strict=True):
        if isinstance(leaf, nn.BatchNorm2d):
            assert torch.equal(leaf.weight, scale)
        else:
            assert leaf.weight.norm().item() == pytest.approx(scale.item(), rel=1e-5)
    assert all(m.item() >= floor > 0 for m, floor in zip(hook.ms, hook.floors, strict=True))


@pytest.mark.parametrize("dear", ["convs.1", "convs.2"])
def test_of_two_idle_branches_the_dearer_goes_first(monkeypatch, dear):
    saves = {dear: 3.0, "convs.0": 0.0}
    _, _, hook = learn(lifted(Branches), monkeypatch, 9.0, lambda name: saves.get(name, 1.0))
    factors = {f.block: lam.item() for f, lam in zip(hook.factors, hook.lams, strict=True)}
    assert hook.removed() == (dear,)
    assert factors["convs.1" if dear == "convs.2" else "convs.2"] > 0.2
    assert hook.prices[0] == 0.0  # saves nothing: not pulled at all
    assert factors["convs.0"] > 0.9


def test_a_budget_beyond_all_layers_leaves_half_of_them(monkeypatch):
    _, _, hook = learn(lifted(Branches), monkeypatch, 0.0)
    assert len(hook.removed()) == 2
    assert hook.enough


def test_layers_bring_a_part_of_the_way_only(monkeypatch):
    """4 ms are asked for; one layer brings 3, and the rest is left to narrower ones."""
    _, _, hook = learn(lifted(Branches), monkeypatch, 6.0, lambda name: 3.0 if name == "convs.1" else 2.0)
    assert hook.removed() == ("convs.1",)
    assert hook.enough
    assert hook.enough_ms == pytest.approx(10 - 0.6 * 4)


@pytest.mark.parametrize("stop_at", [50, 110])
def test_a_killed_run_goes_on(monkeypatch, tmp_path, stop_at):
    net = lifted(Plain)
    _, whole, first = learn(net, monkeypatch)
    with pytest.raises(KilledError):
        learn(net, monkeypatch, path=tmp_path / "run.pt", stop_at=stop_at)
    _, resumed, second = learn(net, monkeypatch, path=tmp_path / "run.pt")
    assert resumed.history.resumed_from == stop_at // 20 * 20
    assert fingerprint(resumed.network.module) == fingerprint(whole.network.module)
    assert (first.removed(), first.enough) == (second.removed(), second.enough) == (("idle",), True)


def test_nothing_to_remove_is_an_error(monkeypatch):
    net = lift(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3)).eval(), [(1, 3, 6, 6)])
    with pytest.raises(UnsupportedModelError, match="can be removed"):
        learn(net, monkeypatch)
