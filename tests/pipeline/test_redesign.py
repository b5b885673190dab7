"""Wide and back: the widths that come out are a plan for the original's form, and a fresh network has them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.errors import BudgetMissedError, UsageError
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.pipeline.apply import apply_plan
from edgeprune.pipeline.redesign import fresh, plan_for, widened
from edgeprune.plan.problem import Plan, Recipe


class Residual(nn.Module):
    def __init__(self, inner=12):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.norm, self.b = (
            nn.Conv2d(8, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, 8, 3, padding=1),
        )
        self.c, self.d = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.norm(self.a(x))))
        x = x + self.d(torch.relu(self.c(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return lift(Residual().eval(), [(1, 3, 16, 16)])


def sizes(network):
    return {g.name: g.size for g in analyse(network).groups}


def shapes(network):
    return {k: tuple(v.shape) for k, v in network.module.state_dict().items()}


def test_inner_layers_become_wider(network):
    assert sizes(network) == {"stem": 8, "a": 12, "c": 6}
    assert sizes(widened(network, 1.25)) == {"stem": 8, "a": 15, "c": 8}
    x = network.random_inputs(2)[0]
    with torch.no_grad():
        torch.testing.assert_close(widened(network, 1.25).module(x), network.module(x))


def test_there_and_back(network):
    """What two plans made of the wide network, one plan says of the original."""
    wide = widened(network, 1.5)
    first = Plan({"a": 16, "stem": 6}, keep={"a": tuple(range(16)), "stem": (0, 1, 2, 4, 5, 7)})
    second = Plan({"a": 14, "c": 5}, keep={"a": tuple(range(2, 16)), "c": (0, 2, 4, 6, 8)})
    final = apply_plan(apply_plan(wide, first), second)
    plan = plan_for(network, wide, Recipe((first, second)))
    assert plan.widths == {"stem": 6, "a": 14, "c": 5}
    new = fresh(network, Recipe((plan,)), seed=3)
    assert shapes(new) == shapes(final)
    again = fresh(network, Recipe((plan,)), seed=3).module.state_dict()
    for key, value in new.module.state_dict().items():
        assert torch.equal(again[key], value)
    assert not torch.equal(fresh(network, Recipe((plan,)), seed=4).module.a.weight, new.module.a.weight)
    bound = 1 / np.sqrt(6 * 9)  # of the layer's own initialisation
    assert 0.8 * bound < float(new.module.a.weight.detach().abs().max()) <= bound


def test_widths_that_stay_are_left_out(network):
    wide = widened(network, 1.5)
    back = Plan({"a": 12, "c": 9}, keep={"a": tuple(range(12))})
    assert plan_for(network, wide, Recipe((back,))).widths == {"c": 9}


def test_removed_blocks_are_part_of_it(network):
    wide = widened(network, 1.5)
    step = Plan({"a": 13}, removed=("c",), keep={"a": tuple(range(13))})
    name = next(b.name for b in edgeprune.graph.blocks.find_blocks(network) if "c" in b.name or b.name == "c")
    plan = plan_for(network, wide, Recipe((Plan(step.widths, (name,), step.keep),)))
    assert "c.weight" not in shapes(fresh(network, Recipe((plan,))))
    with pytest.raises(UsageError, match="does not have"):
        fresh(network, Recipe((Plan({}, removed=("nothing",)),)))


def test_refused(network):
    for factor in (1.0, 0.5, 100.0):
        with pytest.raises(UsageError, match="--factor"):
            widened(network, factor)
    linear = lift(nn.Sequential(nn.Linear(4, 3)).eval(), [(1, 4)])
    with pytest.raises(UsageError, match="nothing can be widened"):
        widened(linear, 1.5)


def test_from_the_command_to_a_fresh_network(monkeypatch, tmp_path):
    """The whole way on a network whose inner layer is far too wide for what it does."""
    from edgeprune.cli import main

    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    model = lift(Residual(inner=32).eval(), [(1, 3, 32, 32)])
    edgeprune.save(model, tmp_path / "net.pt2")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 96)
    np.savez(tmp_path / "data.npz", x=rng.integers(0, 256, (96, 3, 32, 32), dtype=np.uint8), y=y)
    out = tmp_path / "out"
    try:
        result = edgeprune.redesign(
            tmp_path / "net.pt2", data=str(tmp_path / "data.npz"), factor=3.0, method="cap", epochs=4, out=out
        )
    except BudgetMissedError:
        pytest.skip("this machine was too busy to measure")
    document = json.loads((out / "redesign.json").read_text())
    assert document["steps"][0]["widths"] == dict(result.plan.widths) == result.to_dict()["redesign"]
    assert 0 < result.share < 1
    assert (
        main(["rebuild", str(tmp_path / "net.pt2"), str(out / "redesign.json"), "--out", str(tmp_path / "f.pt2")]) == 0
    )
    assert shapes(edgeprune.load(tmp_path / "f.pt2")) == shapes(result.network)
    assert "redesign.json" in result.text()
    assert (
        main(["rebuild", str(tmp_path / "net.pt2"), str(tmp_path / "net.pt2"), "--out", str(tmp_path / "g.pt2")]) == 2
    )
    assert not (tmp_path / "g.pt2").exists()
