"""Plans applied one after another, against the one final plan applied to the original."""

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import UsageError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.pipeline.apply import State, advance, apply_plan, apply_recipe
from edgeprune.plan.problem import Plan, Ranking, Recipe


class Residual(nn.Module):
    def __init__(self, channels, inner, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, groups=groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions, residual blocks, and a flattened linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8, 12), Residual(8, 6), Residual(8, 16, groups=4))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 10, 2, stride=2)
        self.head = nn.Linear(10 * 8 * 8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.up(self.depthwise(self.blocks(torch.relu(self.stem(x)))))).flatten(1))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return lift(Net().eval(), [(1, 3, 4, 4)])


def random_rankings(network, seed):
    rng = np.random.default_rng(seed)
    return {g.name: Ranking(rng.permutation(g.size), np.zeros(g.size + 1)) for g in analyse(network).groups}


@pytest.mark.parametrize("seed", range(4))
def test_a_recipe_repeats_what_was_done(network, seed):
    rng = np.random.default_rng(seed)
    state = State(network)
    blocks = find_blocks(network)
    removals = rng.permutation(len(blocks))[:2]
    for step in range(2):
        channels = analyse(state.network)
        rankings = random_rankings(state.network, 10 * seed + step)
        widths = {g.name: int(rng.integers(1, g.size + 1)) for g in channels.groups}
        state = advance(state, Plan(widths, removed=(blocks[removals[step]].name,)), rankings)
    again = apply_recipe(network, Recipe.from_json(state.recipe.to_json()))
    x = network.random_inputs(2)[0]
    with torch.no_grad():
        torch.testing.assert_close(again.module(x), state.network.module(x), rtol=0, atol=0)
    shapes = {k: v.shape for k, v in state.network.module.state_dict().items()}
    assert {k: v.shape for k, v in again.module.state_dict().items()} == shapes
    assert set(state.recipe.removed) == {blocks[i].name for i in removals}
    assert shapes["up.weight"] != network.module.state_dict()["up.weight"].shape


def test_the_network_a_plan_was_made_from_is_left_alone(network):
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    state = State(network)
    advance(state, Plan({g.name: 1 for g in analyse(network).groups}), random_rankings(network, 0))
    after = network.module.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0)


def test_a_foreign_plan_is_refused(network):
    with pytest.raises(UsageError, match="nowhere"):
        apply_plan(network, Plan({}, keep={"nowhere": (0,)}))
    with pytest.raises(UsageError, match="no.block"):
        apply_plan(network, Plan({}, removed=("no.block",)))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1}', '{"version": 99, "steps": []}', '{"version": 1, "steps": [{"widths": 3}]}',
     '{"version": 1, "steps": [{"widths": {"a": 2}, "removed": [], "keep": {"a": [1]}}]}']
)  # fmt: skip
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(UsageError, match="plan"):
        Recipe.from_json(text)
