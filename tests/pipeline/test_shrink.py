"""Rounds of shrinking with a planner, prices and a clock that are made up: what is asked of whom, and how often."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import BudgetUnreachableError
from edgeprune.graph.lift import lift
from edgeprune.methods import PLANNERS, SELECTORS
from edgeprune.pipeline.judging import Judge
from edgeprune.pipeline.shrink import Judgement, predicted_ms, shrink
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.exact import exact
from edgeprune.plan.problem import Ranking


class Sizes:
    """Milliseconds of a kernel: its elements. Counts how often each kernel is asked for."""

    fusion = None

    def __init__(self, step=1):
        self.asked = 0
        self.step = step

    def prepare(self, anatomy):
        return [tuple(sorted({*range(self.step, g.size, self.step), g.size})) for g in anatomy.channels.groups]

    def kernel_ms(self, kernel):
        self.asked += 1
        return float(np.prod(kernel.output) + sum(map(np.prod, kernel.inputs))) * 1e-4

    def constant_ms(self):
        return 0.01


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    return lift(nn.Sequential(*layers).eval(), [(1, 3, 8, 8)])


def judge(state, anatomy, candidates):
    rankings = {g.name: Ranking(np.arange(g.size), np.linspace(1, 0, g.size + 1)) for g in anatomy.channels.groups}
    return Judgement(rankings, {b.name: 0.5 for b in anatomy.blocks})


def shrunk(network, share, prices, planner, slow=1.0):
    """``slow``: how much longer than the table says a cut network takes."""
    full = predicted_ms(dissect(network), Sizes())

    def clock(cut):
        now = predicted_ms(dissect(cut), Sizes())
        return now * (1 if now == full else slow)

    return shrink(
        network, full, share * full, prices, judge, lambda state: state.network, clock, lambda *_: None, planner
    )


def test_a_round_asks_its_planner_once_and_every_attempt_the_same_plans(network):
    problems, budgets = [], []

    def planner(problem, trials):
        problems.append(problem)
        plans = exact(problem, trials)

        def plan(budget_ms):
            budgets.append(budget_ms)
            return plans(budget_ms)

        return plan

    result = shrunk(network, 0.5, Sizes(), planner, slow=1.15)
    assert result.rounds == len(problems) > 2
    assert len(result.attempts) > 1  # the clock disagrees with the table
    assert len(budgets) == result.rounds - 1 + len(result.attempts)


def test_attempts_price_nothing_again(network):
    asked = []
    for slow in (1.0, 1.15):
        prices = Sizes()
        result = shrunk(network, 0.9, prices, exact, slow)
        asked.append((len(result.attempts), prices.asked))
    assert asked[1][0] > asked[0][0]
    assert asked[1][1] == asked[0][1]


def test_the_prediction_is_the_tables_whatever_the_planner_says(network):
    def boastful(problem, trials):
        return lambda budget_ms: dataclasses.replace(exact(problem)(budget_ms), predicted_ms=budget_ms)

    result = shrunk(network, 0.5, Sizes(), boastful)
    full = predicted_ms(dissect(network), Sizes())
    assert result.predicted_share * full == pytest.approx(result.measured_ms, rel=1e-9)


def test_a_budget_below_the_smallest_network_is_refused_before_judging(network):
    def never(*_):
        raise AssertionError("judged for nothing")

    full = predicted_ms(dissect(network), Sizes())
    with pytest.raises(BudgetUnreachableError, match="ask for --latency"):
        shrink(network, full, 0.01 * full, Sizes(), never, never, never, never)


class Residual(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.gain = gain

    def forward(self, x):
        return torch.relu(x + self.gain * self.conv2(torch.relu(self.conv1(x))))


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    blocks = [Residual(gain) for gain in (0.3, 0.1, 0.5, 0.2, 0.4, 0.6)]
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *blocks, nn.Flatten(), nn.Linear(8 * 64, 5)]
    return lift(nn.Sequential(*layers).eval(), [(1, 3, 8, 8)])


@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_meets_a_measured_budget_and_keeps_to_what_it_decides(residual, name):
    full = predicted_ms(dissect(residual), Sizes())
    planner = PLANNERS[name]
    batches = [torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    judge = Judge(residual, SELECTORS["cap"].function, batches, lambda *_: None, torch.arange(96) % 5)
    result = shrink(
        residual, full, 0.6 * full, Sizes(step=4), judge.judge, judge.repair,
        lambda cut: 1.05 * predicted_ms(dissect(cut), Sizes()), lambda *_: None, planner.function,
        planner.decides != "widths",
    )  # fmt: skip
    assert 0.7 * 0.6 * full < result.measured_ms <= 0.6 * full
    assert result.measured_ms == pytest.approx(1.05 * predicted_ms(dissect(result.network), Sizes()))
    assert any(plan.keep for plan in result.recipe.steps) or result.recipe.removed
    if planner.decides == "widths":
        assert result.recipe.removed == ()


def test_a_planner_that_keeps_blocks_is_refused_what_needs_them_gone(residual):
    full = predicted_ms(dissect(residual), Sizes())
    for removes_blocks, words in ((True, "blocks removed"), (False, "blocks kept.*--planner exact")):
        with pytest.raises(BudgetUnreachableError, match=words) as caught:
            shrink(
                residual, full, 0.02 * full, Sizes(), None, None, None, None, PLANNERS["uniform"].function,
                removes_blocks,
            )  # fmt: skip
        assert "None" not in str(caught.value)
