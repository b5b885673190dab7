"""Instances of the size of real networks, from tools/bench_plan: proven to 0.05 % well within the time."""

import importlib.machinery
import importlib.util
import time
from pathlib import Path

import pytest

from edgeprune.plan import eliminate
from edgeprune.plan.exact import evaluate, solve
from edgeprune.plan.factors import build
from edgeprune.plan.problem import Problem


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[2] / "tools" / "bench_plan"
    loader = importlib.machinery.SourceFileLoader("bench_plan", str(path))
    spec = importlib.util.spec_from_loader("bench_plan", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def at(problem, share):
    return Problem(problem.groups, problem.blocks, problem.terms, share * evaluate(problem, {})[0])


@pytest.mark.parametrize("name", ["resnet50", "resnet56", "mobilenetv2", "densenet121"])
@pytest.mark.parametrize("share", [0.65, 0.35])
def test_gap_is_proven_in_time(bench, name, share):
    problem = at(bench.NETWORKS[name][0](), share)
    started = time.process_time()
    plan = solve(problem)
    assert time.process_time() - started < 15
    assert plan.gap is not None
    assert plan.gap <= 5e-4
    latency, damage = evaluate(problem, plan.widths, plan.removed)
    assert 0.98 * problem.budget_ms < latency <= problem.budget_ms * (1 + 1e-9)
    assert damage == plan.damage


def test_many_plans_that_are_nearly_equal(bench):
    plan = solve(at(bench.NETWORKS["resnet50-alike"][0](), 0.35))
    assert plan.gap is not None
    assert plan.gap <= 5e-4


def test_resnet50_has_the_size_asked_for(bench):
    problem = bench.resnet50()
    assert len(problem.groups) == 37
    assert len(problem.blocks) == 16
    assert sum(len(g.widths) for g in problem.groups) == 716
    assert build(problem).cells > 52_000


@pytest.mark.parametrize("name", ["resnet56", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_the_integer_programme_alone_agrees(bench, name, monkeypatch):
    """Two proofs that share no step after the tables: their intervals must overlap."""
    problem = at(bench.NETWORKS[name][0](), 0.5)
    one = solve(problem)
    monkeypatch.setattr(eliminate, "MAX_CELLS", 0)
    other = solve(problem)
    assert other.gap is not None
    assert one.gap is not None
    assert other.gap <= 5e-4
    assert one.damage * (1 - one.gap) <= other.damage
    assert other.damage * (1 - other.gap) <= one.damage
