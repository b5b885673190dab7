"""Depth, width and resolution decided together, from a few cheap compressed networks.

Source: Wang et al., "Accurate and efficient network pruning in three dimensions" (ICML 2021); the mathematics is in
plan/scaling.py. Networks cut along one axis each (fewer blocks; narrower groups; a smaller input) are repaired in
closed form and scored on images kept apart; the fitted accuracy then tells which point of the real grid is best within
the budget, and that point is built and timed whole.

Deviations: latency measured on the target takes the place of multiply-adds; samples are repaired in closed form
instead of trained; an axis is sampled as far as it would have to go if it had to pay for the budget alone. Of the
answer only the resolution is taken as it is: what the budget still lacks there the ordinary planner decides, which
knows every group and block instead of one share for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import UsageError
from edgeprune.graph.count import count
from edgeprune.graph.network import Network
from edgeprune.graph.resolution import Size, at_resolution, resolutions, size_of
from edgeprune.pipeline.apply import State, advance
from edgeprune.pipeline.grid import Axes, GridPrices, Scale, price
from edgeprune.pipeline.judging import Judge
from edgeprune.pipeline.shrink import problem_of
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.scaling import AXES, Accuracy, PowerLaw, best_points, fit_accuracy, fit_latency, optimum
from edgeprune.train.dataset import DataSet
from edgeprune.train.evaluate import agreement, evaluate, output_error

STOPS = 3  # samples along depth and along width, beside the original
WIDTHS = 9  # uniform plans in the grid
TRIES = 6  # best points that are timed whole until one is within the budget
SCORE_WORK = 1e11  # multiply-adds spent on the score of one sample
SCORE_IMAGES = (200, 1000)  # at least, at most


@dataclass(frozen=True, slots=True)
class Scaling:
    """size: of the input, the original's own where that is best. document: for the report, plain numbers and text."""

    size: Size
    document: dict[str, Any]


def score_images(original: Network, available: int) -> int:
    """How many samples are kept apart for scores."""
    affordable = int(SCORE_WORK / max(count(original).macs, 1))
    return max(1, min(max(affordable, SCORE_IMAGES[0]), SCORE_IMAGES[1], available // 3))


def choose(
    original: Network,
    original_ms: float,
    budget_ms: float,
    prices: GridPrices,
    judge: Judge,
    clock: Callable[[Network], float],
    validation: DataSet,
    progress: Callable[[float, float, str], None],
) -> Scaling:
    """The resolution to compress ``original`` at, so that ``clock`` (ms of a network timed whole) gives ``budget_ms``.

    judge: on other images than ``validation``
    Raises UnsupportedModelError when the network cannot run at another size.
    """
    anatomy = dissect(original, prices.fusion)
    candidates = prices.prepare(anatomy)
    judgement = judge.judge(State(original), anatomy, candidates)
    axes = Axes(anatomy, judgement, problem_of(anatomy, candidates, prices, judgement))
    timed = _timed(original, original_ms, budget_ms, clock)

    def cut(scale: Scale) -> State:
        return advance(State(at_resolution(original, scale.size)), scale.plan, judgement.rankings)

    stops = _stops(axes, budget_ms * axes.full_ms / original_ms, list(timed))
    kind, scores = "", []
    for number, stop in enumerate(stops):
        progress(number, len(stops), "weighing depth, width and resolution")
        state = cut(stop)
        network = judge.repair(state) if stop.plan.widths or stop.plan.removed else state.network
        kind, score = _score(original, network, validation.resized(*stop.size))
        scores.append(score)
    fitted = fit_accuracy(np.array([stop.point for stop in stops]), scores)
    grid = _grid(axes, stops)
    points = np.array([scale.point for scale in grid])
    costs_ms = _calibrated(grid, price(axes, grid, prices), timed)
    best, measured_ms = _closed(
        lambda ms: best_points(fitted, points, ms, budget_ms), grid, costs_ms, lambda scale: clock(cut(scale).network)
    )
    law = fit_latency(points, costs_ms)
    document = {
        "score": kind,
        "images": len(validation),
        "samples": [{**_named(stop.point), "score": float(score)} for stop, score in zip(stops, scores, strict=True)],
        "latency_powers": _named(law.powers),
        "continuous_optimum": _continuous(fitted, law, budget_ms),
        "chosen": {
            **_named(grid[best].point),
            "input": list(grid[best].size),
            "score": float(fitted(points[best])),
            "predicted_ms": float(costs_ms[best]),
            "measured_ms": measured_ms,
        },
    }
    return Scaling(grid[best].size, document)


def _timed(
    original: Network, original_ms: float, budget_ms: float, clock: Callable[[Network], float]
) -> dict[Size, float]:
    """Milliseconds of the whole network at every size worth considering: down to the first that is enough alone."""
    timed = {size_of(original): original_ms}
    for size in resolutions(original):
        if min(timed.values()) <= budget_ms:
            break
        timed[size] = clock(at_resolution(original, size))
    return timed


def _stops(axes: Axes, budget_ms: float, sizes: Sequence[Size]) -> list[Scale]:
    """The original and the samples along each axis. budget_ms: of the table. sizes: the original's first."""
    whole = axes.scale(0, {}, sizes[0])
    enough = next((k for k in range(len(axes.blocks) + 1) if axes.shallow_ms(k) <= budget_ms), len(axes.blocks))
    counts = dict.fromkeys(int(k) for k in np.linspace(0, enough, STOPS + 1).round())
    shallow = [axes.scale(k, {}, sizes[0]) for k in counts if k]
    narrow = axes.narrow(np.linspace(axes.full_ms, budget_ms, STOPS + 1).tolist())
    found = [*shallow, *(axes.scale(0, plan.widths, sizes[0]) for plan in narrow)]
    found += [axes.scale(0, {}, size) for size in sizes[1:]]
    return [whole, *(scale for scale in found if scale.point != whole.point)]


def _grid(axes: Axes, stops: Sequence[Scale]) -> list[Scale]:
    """All combinations within the box of the samples."""
    removed = max(len(stop.plan.removed) for stop in stops)
    sizes = list(dict.fromkeys(stop.size for stop in stops))
    narrowest = min(axes.narrow_ms(stop.plan) for stop in stops)
    return axes.combinations(removed, axes.narrow(np.linspace(axes.full_ms, narrowest, WIDTHS).tolist()), sizes)


def _calibrated(grid: Sequence[Scale], table_ms: np.ndarray, timed: Mapping[Size, float]) -> np.ndarray:
    """The table's milliseconds, scaled at every size so that the whole network there takes what it measured."""
    result = table_ms.copy()
    for size, measured_ms in timed.items():
        mine = np.array([scale.size == size for scale in grid])
        whole = next(i for i, s in enumerate(grid) if s.size == size and s.point[0] == s.point[1] == 1)
        result[mine] *= measured_ms / table_ms[whole]
    return result


def _closed(
    ranked: Callable[[np.ndarray], np.ndarray],
    grid: Sequence[Scale],
    costs_ms: np.ndarray,
    measure: Callable[[Scale], float],
) -> tuple[int, float | None]:
    """(the best point that is within the budget by measurement, its ms); the fastest and None where none is.

    ranked: costs in ms -> the points within the budget, the best first. Every measurement corrects ``costs_ms``, in
    place, for all points at its size, until the best one is measured.
    """
    measured: dict[int, float] = {}
    for _ in range(TRIES):
        order = ranked(costs_ms)
        if not len(order) or int(order[0]) in measured:
            break
        best = int(order[0])
        measured[best] = measure(grid[best])
        costs_ms[[scale.size == grid[best].size for scale in grid]] *= measured[best] / costs_ms[best]
    for i, ms in measured.items():
        costs_ms[i] = ms
    held = [int(i) for i in ranked(costs_ms) if int(i) in measured]
    return (held[0], measured[held[0]]) if held else (int(np.argmin(costs_ms)), None)


def _score(original: Network, network: Network, data: DataSet) -> tuple[str, float]:
    """(what it is, a share in 0..1 of what the original's would be or is): the more the better."""
    if (accuracy := evaluate(network.module, data)) is not None:
        return "accuracy", accuracy
    if (same := agreement(network.module, original.module, data)) is not None:
        return "agreement", same
    return "1 - output error", max(0.0, 1 - output_error(network.module, original.module, data))


def _continuous(fitted: Accuracy, law: PowerLaw, budget_ms: float) -> dict[str, float] | None:
    """Where the fitted accuracy is largest under the power law: what a network of any size would be."""
    try:
        return _named(optimum(fitted, law, budget_ms))
    except UsageError:
        return None


def _named(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(AXES, values, strict=True)}
