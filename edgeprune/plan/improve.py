"""Better plans near a plan: exact latency and damage of an assignment of states, and descent by single changes.

A change is taken when it lowers the damage within the budget, or widens a group at no more damage and no more latency:
a plan never stays left of a width that costs nothing. States are the original ones of a Model's groups and blocks.
"""

from __future__ import annotations

import math

import numpy as np

from edgeprune.plan.factors import Model
from edgeprune.plan.problem import Problem


class Improver:
    def __init__(self, problem: Problem, model: Model) -> None:
        self.model = model
        self.choices = model.n_groups + model.n_blocks
        self.sums = {s.total: s for s in model.sums}
        self.uses: list[list[int]] = [[] for _ in model.variables]  # sums that a variable is part of
        for s in model.sums:
            self.uses[s.left].append(s.total)
            self.uses[s.right].append(s.total)
        self.tables = list(model.latency.items())
        self.touching: list[list[int]] = [[] for _ in model.variables]
        for number, (scope, _) in enumerate(self.tables):
            for i in scope:
                self.touching[i].append(number)
        self.inside: list[list[int]] = [
            [i for i in range(model.n_groups) if model.variables[i].block == b] for b in range(len(model.variables))
        ]

    def complete(self, states: np.ndarray) -> list[int]:
        """The state of every variable, sums included, from those of groups and blocks."""
        full = [int(s) for s in states[: self.choices]]
        for s in self.model.sums:
            full.append(int(s.states[full[s.left], full[s.right]]))
        return full

    def latency(self, states: np.ndarray) -> float:
        full = self.complete(states)
        parts = [float(table[tuple(full[i] for i in scope)]) for scope, table in self.tables]
        return math.fsum([self.model.constant_ms, *parts])

    def damage(self, states: np.ndarray) -> float:
        return math.fsum(float(self.model.damage[i][states[i]]) for i in range(self.choices))

    def improve(self, states: np.ndarray, limit_ms: float) -> tuple[np.ndarray, float]:
        """The plan after single changes, and its damage."""
        current = np.array(states[: self.choices])
        latency = self.latency(current)
        changed = True
        while changed:
            changed = False
            for i in range(self.model.n_groups):
                variable = self.model.variables[i]
                if variable.block is not None and current[variable.block] == 1:
                    continue
                damage = self.model.damage[i]
                here = int(current[i])
                for state in range(len(variable.values) - 1, -1, -1):
                    saved = damage[here] - damage[state]
                    if saved < 0 or (saved == 0 and state <= here):
                        continue
                    cost = self._moved(current, i, state) - self._moved(current, i, here)
                    if latency + cost <= limit_ms if saved > 0 else cost <= 0:
                        current[i] = state
                        latency = self.latency(current)
                        changed = True
                        break
            for block in range(self.model.n_groups, self.choices):
                if current[block] == 1:
                    trial = current.copy()
                    trial[block] = 0
                    for i in self.inside[block]:
                        trial[i] = len(self.model.variables[i].values) - 1
                    value = self.latency(trial)
                    if value <= limit_ms and self.damage(trial) < self.damage(current):
                        current, latency, changed = trial, value, True
        return current, self.damage(current)

    def _moved(self, states: np.ndarray, group: int, state: int) -> float:
        """Latency of the tables that depend on a group, were it in a state."""
        trial = states.copy()
        trial[group] = state
        full = self.complete(trial)
        affected = {group}
        stack = [group]
        while stack:
            for total in self.uses[stack.pop()]:
                if total not in affected:
                    affected.add(total)
                    stack.append(total)
        numbers = sorted({n for i in affected for n in self.touching[i]})
        return math.fsum(float(self.tables[n][1][tuple(full[i] for i in self.tables[n][0])]) for n in numbers)
