"""Compressing by a method that trains: search under the target's prices, then the usual plan, closed by measurement.

The search gets a share of the time for training, recovery after the cut gets what it leaves. What the learner found
comes as rankings and damages; so the exact planner repeats the learner's own end where that measures within the
budget, and goes a step further or back where it does not. A learner that ranks nothing leaves a trained network that is
judged as any other: by what its cuts do to *its* outputs, in rounds, repaired after each; where it scored the channels,
these scores say which of a group go first. What a learner cannot decide is decided before it: a learner of widths
starts without the blocks that the usual way to the budget takes out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.leftovers import lone_activations
from edgeprune.graph.network import Network
from edgeprune.pipeline.apply import State, advance
from edgeprune.pipeline.fit import AIM
from edgeprune.pipeline.problem import Widths
from edgeprune.pipeline.shrink import Judgement, Prices, Shrunk, predicted_ms, problem_of, refuse_unreachable, shrink
from edgeprune.pipeline.spans import Anatomy, dissect
from edgeprune.plan.exact import evaluate
from edgeprune.plan.problem import Plan, Planner, Ranking, Recipe
from edgeprune.prune.program import Program, divergence, outputs
from edgeprune.train.config import History, Progress, TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.learner import Learner, Lesson, Price

SEARCH_SHARE = 0.5  # of the training time, at most
LEAST_RECOVERY = 0.1
COMPARED = 256  # images that say whether a search left better weights than it found


class Judging(Protocol):
    """The two things a planning round asks (pipeline/judging.py)."""

    def judge(self, state: State, anatomy: Anatomy, candidates: Sequence[Widths]) -> Judgement: ...
    def repair(self, state: State) -> Network: ...


def blocks_first(
    start: Network,
    original_ms: float,
    start_ms: float,
    budget_ms: float,
    prices: Prices,
    judging: Judging,
    clock: Callable[[Network], float],
    progress: Callable[[float, float, str], None],
    planner: Planner,
) -> tuple[str, ...]:
    """The blocks that ``shrink`` takes out on its way to the budget, for a learner that decides widths alone."""
    shrunk = shrink(
        start, original_ms, budget_ms, prices, judging.judge, judging.repair, clock, progress, planner, True, start_ms
    )
    known = {block.name for block in find_blocks(start)}
    return tuple(name for name in shrunk.recipe.removed if name in known)


def without_blocks(start: State, removed: Sequence[str], judging: Judging) -> State:
    """``start`` with blocks taken out and repaired by ``judging``, which is of ``start.network``."""
    if not removed:
        return start
    state = advance(State(start.network), Plan({}, tuple(removed)), {})
    recipe = Recipe((*start.recipe.steps, *state.recipe.steps))
    return State(judging.repair(state), recipe)


def closer(rewound: Network, trained: Network, original: Network, data: DataSet) -> bool:
    """Whether ``rewound`` answers more like the original than ``trained``. A short training does not make up for what
    its own penalty disturbed."""
    batches = [(x,) for x, _ in data.batches(64, shuffle_seed=1, limit=COMPARED)]
    expected = outputs(Program(original), batches)
    first, second = (divergence(outputs(Program(net), batches), expected) for net in (rewound, trained))
    return first < second


def search_and_shrink(
    start: State,
    original: Network,
    original_ms: float,
    start_ms: float,
    budget_ms: float,
    prices: Prices,
    learner: Learner,
    data: DataSet,
    config: TrainConfig,
    checkpoint: Path | None,
    clock: Callable[[Network], float],
    progress: Callable[[float, float, str], None],
    planner: Planner,
    removes_blocks: bool,
    judge_of: Callable[[Network, Mapping[str, np.ndarray]], Judging],
) -> Shrunk:
    """As ``shrink``, with a learner in place of the judge; ``Shrunk.learning`` tells of its training.

    start:  what is learnt from, of ``start_ms``: what the learner made of the original, maybe without some blocks
    config: of the search and the recovery together
    removes_blocks: whether both learner and planner do
    judge_of: of what a learner trained without ranking it, and its scores
    """
    anatomy = dissect(start.network, prices.fusion)
    candidates = prices.prepare(anatomy)
    correction = start_ms / predicted_ms(anatomy, prices)
    refuse_unreachable(anatomy, candidates, prices, correction, original_ms, budget_ms, removes_blocks)

    def report(step: Progress) -> None:
        progress(step.step, step.steps, "searching")

    widths = {g.name: w for g, w in zip(anatomy.channels.groups, candidates, strict=True)}
    price = pricing_of(anatomy, candidates, prices, correction)
    learned = learner.train(
        Lesson(start.network, original, data, widths, price, AIM * budget_ms, _search(config), checkpoint, report)
    )

    def judge(state: State, anatomy: Anatomy, candidates: Sequence[Widths]) -> Judgement:
        return Judgement(learned.rankings, learned.block_damage)

    if learned.rankings or learned.block_damage:
        shrunk = shrink(
            learned.network, original_ms, budget_ms, prices, judge, lambda state: state.network, clock, progress,
            planner, removes_blocks, start_ms, rounds=1,
        )  # fmt: skip
    else:
        trained = replace(start, network=learned.network)
        if removes_blocks:
            start = without_blocks(start, learned.removed, judge_of(start.network, {}))
        if removes_blocks and learned.removed and closer(start.network, trained.network, original, data):
            start_ms = clock(start.network)
            learned.history.notes.append(
                "the weights are those from before the search: they are closer to the original"
            )
        else:
            start = trained
        usual = judge_of(start.network, learned.scores)
        shrunk = shrink(
            start.network, original_ms, budget_ms, prices, usual.judge, usual.repair, clock, progress, planner,
            removes_blocks, start_ms,
        )  # fmt: skip
    learned.history.notes.extend(_left_behind(shrunk.network, data))
    recipe = Recipe((*start.recipe.steps, *shrunk.recipe.steps))
    return replace(shrunk, recipe=recipe, learning=learned.history)


def _left_behind(network: Network, data: DataSet) -> list[str]:
    sample = [x for x, _ in data.batches(64, shuffle_seed=0, limit=64)]
    found = lone_activations(network, sample[:1])
    return [
        f"activation {name} stays behind a removed layer: dropping it would change the outputs by {error:.2g} of "
        "their squared size"
        for name, error in found.items()
    ]


def pricing_of(anatomy: Anatomy, candidates: Sequence[Widths], prices: Prices, correction: float) -> Price:
    """(group name -> width, groups not named are whole; names of removed blocks) -> ms: the table's, times
    ``correction``. A width that is no candidate has the price of the next larger one: a search that was killed may know
    others."""
    free = {g.name: Ranking.free(g.size) for g in anatomy.channels.groups}
    problem = problem_of(anatomy, candidates, prices, Judgement(free, {b.name: 0.0 for b in anatomy.blocks}))

    known = {group.name: group.widths for group in problem.groups}

    def latency_ms(widths: Mapping[str, int], removed: Collection[str]) -> float:
        priced = {name: known[name][bisect_left(known[name], width)] for name, width in widths.items()}
        return evaluate(problem, priced, removed)[0] * correction

    return latency_ms


def after_search(config: TrainConfig, learning: History) -> TrainConfig:
    """What a search leaves of the training that was asked for."""
    unit, length = _length(config)
    spent = {"minutes": learning.seconds / 60, "epochs": learning.epochs, "steps": float(learning.steps)}[unit]
    return _lasting(config, unit, max(length - spent, LEAST_RECOVERY * length))


def _search(config: TrainConfig) -> TrainConfig:
    unit, length = _length(config)
    return _lasting(config, unit, SEARCH_SHARE * length)


def _length(config: TrainConfig) -> tuple[str, float]:
    """(unit, how many of it)."""
    given = {"minutes": config.minutes, "epochs": config.epochs, "steps": config.steps}
    return next(((unit, float(length)) for unit, length in given.items() if length is not None), ("epochs", 5.0))


def _lasting(config: TrainConfig, unit: str, length: float) -> TrainConfig:
    if unit == "steps":
        return replace(config, steps=max(1, round(length)))
    return replace(config, minutes=length) if unit == "minutes" else replace(config, epochs=length)
