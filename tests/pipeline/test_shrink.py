"""Rounds of shrinking with a planner, prices and a clock that are made up: what is asked of whom, and how often."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import BudgetUnreachableError
from edgeprune.graph.lift import lift
from edgeprune.pipeline.shrink import Judgement, predicted_ms, shrink
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.exact import exact
from edgeprune.plan.problem import Ranking


class Sizes:
    """Milliseconds of a kernel: its elements. Counts how often each kernel is asked for."""

    fusion = None

    def __init__(self):
        self.asked = 0

    def prepare(self, anatomy):
        return [tuple(range(1, g.size + 1)) for g in anatomy.channels.groups]

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
