"""Exact minimum of a weighted sum of damage and latency over a Model, by eliminating its variables one by one.

Source: bucket elimination (Dechter 1999), min-sum. Networks are narrow: a chain of convolutions, a trunk with branches,
a concatenation whose prefix sums form a chain; each keeps at most three variables together, so one pass over all tables
takes milliseconds. With a price on latency this is the Lagrangian of the budget; the backward pass gives, for every
state of every variable, the least cost among all assignments that use it.

Deviations: a sum is a function of two variables and is eliminated by indexing, never as a table over all three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.plan.factors import Model, Scope, Sum

MAX_CELLS = 1 << 23


class TooWideError(Exception):
    """The tables would not fit: the network is no narrow graph. Internal; the caller has another way."""


@dataclass(slots=True)
class _Step:
    variable: int
    inputs: list[int]  # numbers of tables: factors first, then messages
    scope: Scope  # of the joint table; the variable comes first
    message: Scope  # of the message it sends
    sum: Sum | None


class Elimination:
    """A fixed order for one model. Raises TooWideError when a joint table would exceed MAX_CELLS entries."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sizes = [v.size for v in model.variables]
        self.scopes: list[Scope] = []
        self.damage: list[np.ndarray | None] = []  # one of the three is set for every factor
        self.latency: list[np.ndarray | None] = []
        self.hard: list[np.ndarray | None] = []  # 0, or inf where impossible
        for i, damage in enumerate(model.damage):
            self._factor((i,), damage=damage)
        for scope, table in model.latency.items():
            impossible = np.isinf(table)
            self._factor(scope, latency=np.where(impossible, 0.0, table))
            if impossible.any():
                self._factor(scope, hard=np.where(impossible, math.inf, 0.0))
        for i, v in enumerate(model.variables):
            if v.block is not None and v.kind == "group":
                away = np.arange(v.size) == (-1 if v.gone is None else v.gone)
                removed = model.variables[v.block].states == 1
                wrong = np.where(away[:, None] != removed[None, :], math.inf, 0.0)
                self._factor((i, v.block), hard=wrong)
        self.steps = self._order()

    def _factor(
        self,
        scope: Scope,
        damage: np.ndarray | None = None,
        latency: np.ndarray | None = None,
        hard: np.ndarray | None = None,
    ) -> None:
        self.scopes.append(scope)
        self.damage.append(damage)
        self.latency.append(latency)
        self.hard.append(hard)

    def _order(self) -> list[_Step]:
        sums = {s.total: s for s in self.model.sums}
        waiting = dict.fromkeys(range(len(self.sizes)), 0)  # sums that must go before their parts
        for s in self.model.sums:
            waiting[s.left] += 1
            waiting[s.right] += 1
        alive = dict(enumerate(self.scopes))
        touching: dict[int, set[int]] = {v: set() for v in waiting}
        for number, scope in alive.items():
            for v in scope:
                touching[v].add(number)
        cost: dict[int, int] = {}

        def price(v: int) -> int:
            joint = set().union(*(alive[n] for n in touching[v])) | {v}
            size = math.prod(self.sizes[u] for u in joint)
            if v in sums:
                after = (joint - {v}) | {sums[v].left, sums[v].right}
                size += math.prod(self.sizes[u] for u in after)
            return size

        steps: list[_Step] = []
        left = set(waiting)
        total = 0
        while left:
            for v in left:
                if waiting[v] == 0 and v not in cost:
                    cost[v] = price(v)
            v = min((v for v in left if waiting[v] == 0), key=lambda v: (cost[v], v))
            total += cost[v]
            if cost[v] > MAX_CELLS or total > 4 * MAX_CELLS:
                raise TooWideError
            inputs = sorted(touching[v])
            joint = set().union(*(alive[n] for n in inputs)) - {v}
            made = sums.get(v)
            if made is None:
                scope, message = (v, *sorted(joint)), tuple(sorted(joint))
            else:
                parts = [u for u in (made.left, made.right) if u in joint]
                rest = sorted(joint - set(parts))
                scope, message = (v, *parts, *rest), (made.left, made.right, *rest)
                waiting[made.left] -= 1
                waiting[made.right] -= 1
            number = len(self.scopes) + len(steps)
            steps.append(_Step(v, inputs, scope, message, made))
            changed = set(message)
            for n in inputs:
                for u in alive.pop(n):
                    touching[u].discard(n)
                    changed.add(u)
            alive[number] = message
            for u in message:
                touching[u].add(number)
            left.discard(v)
            for u in changed:
                cost.pop(u, None)
        return steps

    def _forward(
        self, damage_weight: float, price: float, jitter: Sequence[np.ndarray] | None = None
    ) -> tuple[float, list[np.ndarray], list[np.ndarray]]:
        tables = self._weighted(damage_weight, price)
        if jitter is not None:
            tables[: len(jitter)] = [t * j for t, j in zip(tables, jitter, strict=False)]
        scopes = [*self.scopes, *(s.message for s in self.steps)]
        joints = []
        value = 0.0
        for step in self.steps:
            joint = np.zeros([self.sizes[u] for u in step.scope])
            for n in step.inputs:
                joint += _spread(tables[n], scopes[n], step.scope)
            joints.append(joint)
            if step.sum is None:
                message = joint.min(axis=0)
            else:
                message = joint[self._index(step)]
                message[step.sum.states < 0] = math.inf
            tables.append(message)
            if not step.message:
                value += float(message)
        return value, joints, tables

    def _weighted(self, damage_weight: float, price: float) -> list[np.ndarray]:
        tables = []
        for damage, latency, hard in zip(self.damage, self.latency, self.hard, strict=True):
            if damage is not None:
                tables.append(damage_weight * damage)
            elif latency is not None:
                tables.append(price * latency)
            else:
                assert hard is not None
                tables.append(hard)
        return tables

    def _index(self, step: _Step) -> tuple[np.ndarray, ...]:
        assert step.sum is not None
        index = [step.sum.states]
        for u in step.scope[1:]:
            if u == step.sum.left:
                index.append(np.arange(self.sizes[u])[:, None])
            elif u == step.sum.right:
                index.append(np.arange(self.sizes[u])[None, :])
        return tuple(index)

    def minimise(
        self, damage_weight: float, price: float, jitter: Sequence[np.ndarray] | None = None
    ) -> tuple[float, np.ndarray]:
        """Least ``damage_weight * damage + price * latency`` (without the constant) and the state of every variable.

        ``jitter``: factors on the damages, one array per variable."""
        value, joints, _ = self._forward(damage_weight, price, jitter)
        states = np.zeros(len(self.sizes), dtype=np.int64)
        for step, joint in zip(reversed(self.steps), reversed(joints), strict=True):
            if step.sum is None:
                states[step.variable] = int(joint[(slice(None), *(states[u] for u in step.scope[1:]))].argmin())
            else:
                states[step.variable] = step.sum.states[states[step.sum.left], states[step.sum.right]]
        return value, states

    def marginals(self, damage_weight: float, price: float) -> tuple[float, list[np.ndarray]]:
        """The least cost, and for every variable the least cost given each of its states (inf: impossible)."""
        value, joints, tables = self._forward(damage_weight, price)
        down: list[np.ndarray] = [np.zeros(0)] * len(self.steps)
        result: list[np.ndarray] = [np.zeros(0)] * len(self.sizes)
        first = len(self.scopes)
        for i in range(len(self.steps) - 1, -1, -1):
            step, joint = self.steps[i], joints[i]
            if not step.message:
                belief = joint + (value - float(tables[first + i]))
            elif step.sum is None:
                belief = joint + down[i][None]
            else:
                back = np.full(joint.shape, math.inf)
                held = step.sum.states >= 0
                index = tuple(np.broadcast_to(x, held.shape)[held] for x in self._index(step))
                np.minimum.at(back, index, down[i][held])
                belief = joint + back
            result[step.variable] = belief.reshape(len(belief), -1).min(axis=1)
            for n in step.inputs:
                if n >= first:
                    scope = self.steps[n - first].message
                    axes = tuple(p for p, u in enumerate(step.scope) if u not in scope)
                    least = belief.min(axis=axes)
                    kept = [u for u in step.scope if u in scope]
                    least = np.transpose(least, [kept.index(u) for u in scope])
                    own = tables[n]
                    with np.errstate(invalid="ignore"):
                        down[n - first] = np.where(np.isinf(own), math.inf, least - own)
        return value, result


def _spread(table: np.ndarray, scope: Scope, into: Scope) -> np.ndarray:
    """A table over ``scope`` with its axes in the order of ``into``, ready to broadcast."""
    order = sorted(range(len(scope)), key=lambda p: into.index(scope[p]))
    table = np.transpose(table, order)
    shape = [1] * len(into)
    for axis, p in enumerate(order):
        shape[into.index(scope[p])] = table.shape[axis]
    return table.reshape(shape)
