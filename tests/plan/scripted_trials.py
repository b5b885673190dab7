"""Trials without a network: what a move costs is looked up, and every call is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeprune.plan.problem import Move, Problem


class Additive:
    """The problem's own damages: a move costs what it adds to their sum, whatever else was done."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.restart()

    def restart(self) -> None:
        self.accepted: list[Move] = []
        self.asked: list[Move] = []

    def damage(self, *more: Move) -> float:
        moves = [*self.accepted, *more]
        widths = {g.name: g.widths[-1] for g in self.problem.groups}
        widths |= {m.name: m.width for m in moves if m.width is not None}
        removed = {m.name for m in moves if m.width is None}
        total = sum(b.damage for b in self.problem.blocks if b.name in removed)
        for group in self.problem.groups:
            if group.block is None or self.problem.blocks[group.block].name not in removed:
                total += group.damage[group.widths.index(widths[group.name])]
        return total

    def output_error(self, move: Move) -> float:
        self.asked.append(move)
        return self.damage(move) - self.damage()

    layer_error = output_error

    def accept(self, *moves: Move) -> None:
        self.accepted += moves


class Growing:
    """Errors that only grow: each move's own, times what the moves accepted so far make of it."""

    def __init__(self, errors: Mapping[Move, float], growth: Callable[[Move, list[Move]], float]) -> None:
        self.errors, self.growth = errors, growth
        self.restart()

    def restart(self) -> None:
        self.accepted: list[Move] = []
        self.asked: list[Move] = []

    def price(self, move: Move) -> float:
        return self.errors[move] * self.growth(move, self.accepted)

    def output_error(self, move: Move) -> float:
        self.asked.append(move)
        return self.price(move)

    layer_error = output_error

    def accept(self, *moves: Move) -> None:
        self.accepted += moves
