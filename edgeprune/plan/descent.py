"""A plan on its way down, one move at a time, with its latency kept. What greedy, uniform and cap search walk on.

A group's next move is to its widest narrower candidate that saves latency as the network is now: where the next stair
of a group alone is none beside its neighbours' present widths, the one after is taken. Groups of removed blocks do not
move, and nothing ever comes back.
"""

from __future__ import annotations

import math

from edgeprune.errors import BudgetUnreachableError
from edgeprune.plan.exact import SLACK, evaluate
from edgeprune.plan.problem import Move, Plan, Problem


class Descent:
    """Starts with everything kept. ``latency_ms`` is that of the present state."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.group_index = {g.name: i for i, g in enumerate(problem.groups)}
        self.block_index = {b.name: i for i, b in enumerate(problem.blocks)}
        self.widths = {i: g.widths[-1] for i, g in enumerate(problem.groups)}
        self.removed: set[int] = set()
        self._of_group: list[list[int]] = [[] for _ in problem.groups]
        self._of_block: list[list[int]] = [[] for _ in problem.blocks]
        for number, term in enumerate(problem.terms):
            for g in {g for axis in term.axes for g, _ in axis.terms}:
                self._of_group[g].append(number)
            if term.block is not None:
                self._of_block[term.block].append(number)
        self._term_ms = [self._ms(number) for number in range(len(problem.terms))]

    @property
    def latency_ms(self) -> float:
        return math.fsum(self._term_ms)

    def fits(self, budget_ms: float) -> bool:
        return self.latency_ms <= budget_ms * (1 + SLACK)

    def saving(self, move: Move) -> float:
        """Milliseconds that a move saves now."""
        if move.width is None:
            return math.fsum(self._term_ms[number] for number in self._of_block[self.block_index[move.name]])
        g = self.group_index[move.name]
        before, self.widths[g] = self.widths[g], move.width
        saved = math.fsum(self._term_ms[number] - self._ms(number) for number in self._of_group[g])
        self.widths[g] = before
        return saved

    def take(self, *moves: Move) -> None:
        for move in moves:
            if move.width is None:
                block = self.block_index[move.name]
                self.removed.add(block)
                changed = self._of_block[block]
            else:
                g = self.group_index[move.name]
                self.widths[g] = move.width
                changed = self._of_group[g]
            for number in changed:
                self._term_ms[number] = self._ms(number)

    def narrower(self, group: int) -> list[int]:
        """The candidate widths below the present one, widest first; none in a removed block."""
        choice = self.problem.groups[group]
        if choice.block in self.removed:
            return []
        return [w for w in reversed(choice.widths) if w < self.widths[group]]

    def moves(self) -> dict[Move, float]:
        """All next moves and the milliseconds each saves, more than nothing."""
        found: dict[Move, float] = {}
        least = SLACK * self.latency_ms
        for i, group in enumerate(self.problem.groups):
            for width in self.narrower(i):
                move = Move(group.name, width)
                if (saved := self.saving(move)) > least:
                    found[move] = saved
                    break
        for i, block in enumerate(self.problem.blocks):
            move = Move(block.name)
            if i not in self.removed and (saved := self.saving(move)) > least:
                found[move] = saved
        return found

    def plan(self) -> Plan:
        """The present state as a plan, its damage the problem's additive one."""
        removed = tuple(b.name for i, b in enumerate(self.problem.blocks) if i in self.removed)
        widths = {g.name: self.widths[i] for i, g in enumerate(self.problem.groups) if g.block not in self.removed}
        predicted_ms, damage = evaluate(self.problem, widths, removed)
        return Plan(widths=widths, removed=removed, predicted_ms=predicted_ms, damage=damage)

    def _ms(self, number: int) -> float:
        term = self.problem.terms[number]
        if term.block in self.removed:
            return 0.0
        return term.latency_ms[tuple(axis.at(self.widths) for axis in term.axes)]


def unreachable(planner: str, budget_ms: float, least_ms: float) -> BudgetUnreachableError:
    return BudgetUnreachableError(
        f"planner {planner} does not reach {budget_ms:.6g} ms: the smallest latency on its way is {least_ms:.6g} ms; "
        "ask for that or more, or use --planner exact"
    )
