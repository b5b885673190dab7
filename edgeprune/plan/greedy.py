"""HBGS and HBGTS: the network shrinks move by move, each the one that costs least error per millisecond it saves.

Source: hierarchical backward greedy search, and tree search, of Purohit et al. (TMLR 2024): every round prunes a few
filters in the layer where that hurts least, by the relative error of the layer's own output against the original's,
fed by the present network (HBGS), or by what comes out at the network's end (HBGTS).
Deviations: a move is a group's next narrower candidate width (a stair of the measured latency) instead of a fixed
number of filters, or one residual block; the least error *per millisecond saved* wins, and what saves nothing is never
moved. HBGTS weighs how much the final error grows: every move starts from the same one, so with equal savings the
choice is the source's. Channels follow any ranking; instead of fine-tuning in every round, the readers of what was
narrowed get their best weights in closed form. The error is tried on calibration data (the public code tries on the
test images). A move is measured anew only while its last error, at what it saves now, makes it one of the cheapest:
errors grow as the network shrinks, so a stale one is a guess from below. Where the last move saves more than was
needed, earlier ones, the latest first, are left out of the plan as long as it stays within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from edgeprune.errors import UsageError
from edgeprune.plan.descent import Descent, unreachable
from edgeprune.plan.exact import SLACK
from edgeprune.plan.problem import Move, Plan, Plans, Problem, Trials

LOOKS = 6  # moves measured anew in a round, at most; those never measured come on top
FREE = 1e-9  # an error that is none counts as this: of two free moves the one that saves more is better


def hbgs(problem: Problem, trials: Trials | None) -> Plans:
    """The planner that judges a move by the layers that read what it changes. Raises UsageError without trials."""
    found = _needed(trials, "hbgs")
    return _Path(problem, found, found.layer_error, "hbgs").plan


def hbgts(problem: Problem, trials: Trials | None) -> Plans:
    """The planner that judges a move by the network's final output. Raises UsageError without trials."""
    found = _needed(trials, "hbgts")
    return _Path(problem, found, found.output_error, "hbgts").plan


def _needed(trials: Trials | None, planner: str) -> Trials:
    if trials is None:
        raise UsageError(f"planner {planner} tries its moves on images; give --data, or use --planner exact")
    return trials


class _Path:
    """The way down, as far as it was asked for. A smaller budget goes on from where the last one ended."""

    def __init__(self, problem: Problem, trials: Trials, error: Callable[[Move], float], name: str) -> None:
        self.problem, self.trials, self.error, self.name = problem, trials, error, name
        self.state = Descent(problem)
        self.moves: list[Move] = []
        self.latency_ms = [self.state.latency_ms]  # before each move, and after the last
        self.known: dict[Move, float] = {}  # the last measured error of a move

    def plan(self, budget_ms: float) -> Plan:
        limit_ms = budget_ms * (1 + SLACK)
        while self.latency_ms[-1] > limit_ms:
            move = self._choose()
            if move is None:
                raise unreachable(self.name, budget_ms, self.latency_ms[-1])
            self.state.take(move)
            self.trials.accept(move)
            self.moves.append(move)
            self.latency_ms.append(self.state.latency_ms)
        steps = next(n for n, ms in enumerate(self.latency_ms) if ms <= limit_ms)
        return self._without_waste(self.moves[:steps], limit_ms)

    def _without_waste(self, moves: list[Move], limit_ms: float) -> Plan:
        kept, before = moves, -1
        while len(kept) != before:
            before = len(kept)
            for move in reversed(kept):
                fewer = [m for m in kept if m != move]
                narrower = any(m.name == move.name and m.width < move.width for m in fewer if m.width and move.width)
                if not narrower and self._after(fewer).latency_ms <= limit_ms:
                    kept = fewer
        return self._after(kept).plan()

    def _after(self, moves: list[Move]) -> Descent:
        state = Descent(self.problem)
        state.take(*moves)
        return state

    def _choose(self) -> Move | None:
        """The cheapest move by its price, error per millisecond; None when nothing saves any more."""
        savings = self.state.moves()
        guesses = {move: self.known.get(move, -math.inf) / saved for move, saved in savings.items()}
        best, least, looks = None, math.inf, 0
        for move in sorted(guesses, key=guesses.__getitem__):
            stale = move in self.known
            if best is not None and (guesses[move] >= least or (stale and looks >= LOOKS)):
                break
            looks += stale
            self.known[move] = max(self.error(move), FREE)
            price = self.known[move] / savings[move]
            if price < least:
                best, least = move, price
        return best
