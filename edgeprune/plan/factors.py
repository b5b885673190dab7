"""A Problem as a factor graph: finite variables, and tables of latency and damage over at most two of them.

Three kinds of variable. A *group* has one state per candidate width; a *block* is kept (0) or removed (1); a *sum* is a
composite axis, one state per attainable channel count, and a function of two earlier variables, so that the axes of a
long concatenation form a chain of prefix sums. A group (or sum) inside a removable block has one more, last state:
*gone*, taken exactly when the block is removed; every table holds 0 there.

Shapes: a table over the scope (a, b) has shape (states of a, states of b); ``inf`` marks what cannot happen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeprune.errors import TableError, UsageError
from edgeprune.plan.problem import Axis, Problem, Term

Scope = tuple[int, ...]


@dataclass(slots=True)
class Variable:
    """states: original numbers of the states still allowed; values: width or channel count by original number."""

    kind: str  # "group", "block" or "sum"
    values: np.ndarray
    block: int | None  # variable index of the block it lies in
    states: np.ndarray

    @property
    def size(self) -> int:
        return len(self.states)

    @property
    def gone(self) -> int | None:
        """Position of the state 'gone', None when there is none or it was excluded."""
        last = len(self.values)
        return self.size - 1 if self.block is not None and self.size and self.states[-1] == last else None


@dataclass(slots=True)
class Sum:
    """``state of total = states[state of left, state of right]``; -1 where it is excluded."""

    total: int
    left: int
    right: int
    states: np.ndarray


@dataclass(slots=True)
class Model:
    """Variables: groups first, then blocks (both in the problem's order), then sums."""

    variables: list[Variable]
    damage: list[np.ndarray]
    latency: dict[Scope, np.ndarray]
    constant_ms: float
    sums: list[Sum]
    n_groups: int
    n_blocks: int
    budget_ms: float
    _axes: dict[tuple[frozenset[tuple[int, int]], int | None], int] = field(default_factory=dict)

    def restrict(self, allowed: Sequence[np.ndarray]) -> Model:
        """The same model with only the allowed states (one boolean mask per variable); keeps blocks and 'gone' in step.

        A variable left without states means that nothing is allowed at all; the caller checks ``empty``."""
        masks = [np.array(mask, bool) for mask in allowed]
        for _ in range(2):
            for mask, variable in zip(masks, self.variables, strict=True):
                if variable.block is None:
                    continue
                removed = self.variables[variable.block].states == 1
                gone = variable.gone
                if gone is None or not mask[gone]:
                    masks[variable.block] &= ~removed
                if not (masks[variable.block] & removed).any() and gone is not None:
                    mask[gone] = False
                if not np.delete(mask, gone if gone is not None else []).any():
                    masks[variable.block] &= removed
                if not (masks[variable.block] & ~removed).any():
                    mask[:] = mask & (np.arange(len(mask)) == (-1 if gone is None else gone))
        keep = [np.flatnonzero(mask) for mask in masks]
        sums = []
        for s in self.sums:
            renumber = np.full(self.variables[s.total].size + 1, -1)
            renumber[keep[s.total]] = np.arange(len(keep[s.total]))
            sums.append(Sum(s.total, s.left, s.right, renumber[s.states[np.ix_(keep[s.left], keep[s.right])]]))
        return Model(
            variables=[
                Variable(v.kind, v.values, v.block, v.states[k]) for v, k in zip(self.variables, keep, strict=True)
            ],
            damage=[d[k] for d, k in zip(self.damage, keep, strict=True)],
            latency={scope: table[np.ix_(*(keep[i] for i in scope))] for scope, table in self.latency.items()},
            constant_ms=self.constant_ms,
            sums=sums,
            n_groups=self.n_groups,
            n_blocks=self.n_blocks,
            budget_ms=self.budget_ms,
        )

    @property
    def empty(self) -> bool:
        return any(v.size == 0 for v in self.variables)

    @property
    def cells(self) -> int:
        """Entries of all two-variable tables and sums: the size of the problem."""
        pairs = {tuple(i for i in scope if self.variables[i].kind != "block") for scope in self.latency}
        pairs |= {tuple(sorted((s.left, s.right))) for s in self.sums}
        return sum(math.prod(self.variables[i].size for i in scope) for scope in pairs if len(scope) == 2)


def build(problem: Problem) -> Model:
    """Compile a problem. Raises UsageError (malformed problem) or TableError (a term lacks an attainable count)."""
    check(problem)
    n = len(problem.groups)
    variables = []
    damage = []
    for group in problem.groups:
        block = None if group.block is None else n + group.block
        live = len(group.widths)
        variables.append(
            Variable("group", np.array(group.widths), block, np.arange(live + (block is not None), dtype=np.int64))
        )
        damage.append(np.array([*group.damage, *([0.0] if block is not None else [])]))
    for choice in problem.blocks:
        variables.append(Variable("block", np.array([0, 1]), None, np.arange(2)))
        damage.append(np.array([0.0, choice.damage]))
    model = Model(variables, damage, {}, 0.0, [], n, len(problem.blocks), problem.budget_ms)
    composite = {(_normal(a), t.block) for t in problem.terms for a in t.axes if len(_normal(a)) > 1}
    for key, block in sorted(composite, key=lambda item: (len(item[0]), sorted(item[0]), item[1] or 0)):
        _sum_variable(model, key, None if block is None else n + block)
    for term in problem.terms:
        _add_term(model, problem, term)
    return model


def check(problem: Problem) -> None:
    """Raises UsageError for anything that has no meaning."""
    for group in problem.groups:
        if not group.widths or list(group.widths) != sorted(set(group.widths)):
            raise UsageError(f"group {group.name}: widths must be ascending and not empty, got {group.widths}")
        if len(group.damage) != len(group.widths):
            raise UsageError(f"group {group.name}: {len(group.widths)} widths but {len(group.damage)} damages")
    costs = [(g.name, d) for g in problem.groups for d in g.damage] + [(b.name, b.damage) for b in problem.blocks]
    for name, cost in costs:
        if not (math.isfinite(cost) and cost >= 0):
            raise UsageError(f"{name}: damage must be finite and not negative, got {cost}")
    if not math.isfinite(problem.budget_ms):
        raise UsageError(f"the budget must be finite, got {problem.budget_ms} ms")
    for term in problem.terms:
        if len(term.axes) > 2:
            raise UsageError(f"term {term.name}: {len(term.axes)} axes, at most 2 are possible")
        for index in {g for axis in term.axes for g, _ in axis.terms}:
            inside = problem.groups[index].block
            if inside is not None and inside != term.block:
                raise UsageError(
                    f"term {term.name} depends on group {problem.groups[index].name} of block "
                    f"{problem.blocks[inside].name} but does not lie in that block"
                )


def _normal(axis: Axis) -> frozenset[tuple[int, int]]:
    merged: dict[int, int] = {}
    for group, multiplicity in axis.terms:
        merged[group] = merged.get(group, 0) + multiplicity
    return frozenset((g, m) for g, m in merged.items() if m)


def _scope_of(model: Model, key: frozenset[tuple[int, int]], block: int | None) -> int | None:
    """The block that a sum lies in: the term's, if any of its groups lies there; else none, so that terms share it."""
    return block if any(model.variables[g].block is not None for g, _ in key) else None


def _sum_variable(model: Model, key: frozenset[tuple[int, int]], block: int | None) -> int:
    """The variable of a composite axis (without its constant), built on the largest one there is."""
    home = _scope_of(model, key, block)
    known = model._axes.get((key, home))
    if known is not None:
        return known
    parts = [part for part, _ in model._axes if part < key and _usable(model, part, home)]
    done = max(parts, key=lambda part: (len(part), sorted(part)), default=frozenset())
    rest = sorted(key - done)
    if not done:
        done = frozenset(rest[:1])
        rest = rest[1:]
        (group, scale), *_ = done
        left, left_values = group, model.variables[group].values * scale
    else:
        left = model._axes[done, _scope_of(model, done, block)]
        left_values = model.variables[left].values
    for group, scale in rest:
        done = done | {(group, scale)}
        left, left_values = _add(model, left, left_values, group, scale, _scope_of(model, done, block))
        model._axes[done, _scope_of(model, done, block)] = left
    return left


def _usable(model: Model, part: frozenset[tuple[int, int]], home: int | None) -> bool:
    inner = _scope_of(model, part, home)
    return (part, inner) in model._axes


def _add(
    model: Model, left: int, left_values: np.ndarray, group: int, scale: int, home: int | None
) -> tuple[int, np.ndarray]:
    right_values = model.variables[group].values * scale
    table = left_values[:, None] + right_values[None, :]
    values, inverse = np.unique(table, return_inverse=True)
    states = np.full((model.variables[left].size, model.variables[group].size), -1)
    states[: len(left_values), : len(right_values)] = inverse.reshape(table.shape)
    total = len(model.variables)
    if home is not None:  # gone when either part is gone; both inner parts go together
        l_inner = model.variables[left].block is not None
        r_inner = model.variables[group].block is not None
        if l_inner and r_inner:
            states[-1, -1] = len(values)
        elif l_inner:
            states[-1, :] = len(values)
        else:
            states[:, -1] = len(values)
    model.variables.append(Variable("sum", values, home, np.arange(len(values) + (home is not None))))
    model.damage.append(np.zeros(model.variables[total].size))
    model.sums.append(Sum(total, left, group, states))
    return total, values


def _resolve(model: Model, axis: Axis, block: int | None) -> tuple[int | None, np.ndarray]:
    """Variable of an axis and the channel count at each of its live states."""
    key = _normal(axis)
    if not key:
        return None, np.array([axis.const])
    if len(key) == 1:
        ((group, scale),) = key
        return group, axis.const + scale * model.variables[group].values
    variable = _sum_variable(model, key, block)
    return variable, axis.const + model.variables[variable].values


def _add_term(model: Model, problem: Problem, term: Term) -> None:
    block = None if term.block is None else model.n_groups + term.block
    resolved = [_resolve(model, axis, block) for axis in term.axes]
    scope = list(dict.fromkeys(variable for variable, _ in resolved if variable is not None))
    lengths = {v: len(values) for v, values in resolved if v is not None}
    # one row of counts per axis, along the live states of the variables of the scope
    columns = []
    for variable, values in resolved:
        if variable is None:
            columns.append(np.full([lengths[v] for v in scope], values[0]))
        else:
            shape = [lengths[v] if v == variable else 1 for v in scope]
            columns.append(np.broadcast_to(values.reshape(shape), [lengths[v] for v in scope]))
    keys = zip(*(c.ravel().tolist() for c in columns), strict=True) if columns else iter([()])
    table = np.array([term.latency_ms.get(key, math.nan) for key in keys], dtype=float)
    table = table.reshape([lengths[v] for v in scope])
    if np.isnan(table).any():
        _check_missing(model, problem, term, table, resolved)
        table = np.where(np.isnan(table), math.inf, table)
    if not (table > -math.inf).all():
        raise UsageError(f"term {term.name}: a latency is -inf")
    inner = False
    for position, variable in enumerate(scope):
        if model.variables[variable].block is not None:
            inner = True
            table = np.pad(table, [(0, int(p == position)) for p in range(len(scope))])
    if block is not None and not inner:
        scope.append(block)
        table = np.stack([table, np.zeros_like(table)], axis=-1)
    if not scope:
        model.constant_ms += float(table)
        return
    order = np.argsort(scope)
    key = tuple(scope[i] for i in order)
    table = np.transpose(table, order)
    model.latency[key] = model.latency[key] + table if key in model.latency else table


def _check_missing(
    model: Model, problem: Problem, term: Term, table: np.ndarray, resolved: list[tuple[int | None, np.ndarray]]
) -> None:
    """A count may be absent only where no widths produce it: two axes that share groups."""
    pairs = {tuple(axis.const for axis in term.axes)}
    for index in {g for axis in term.axes for g, _ in axis.terms}:
        scales = [sum(m for g, m in axis.terms if g == index) for axis in term.axes]
        steps = [tuple(s * int(w) for s in scales) for w in problem.groups[index].widths]
        pairs = {tuple(map(sum, zip(p, q, strict=True))) for p, q in itertools.product(pairs, steps)}
    missing = sorted(p for p in pairs if math.isnan(term.latency_ms.get(p, math.nan)))
    if missing:
        raise TableError(
            f"term {term.name} has no latency for channel counts {missing[0]} ({len(missing)} counts are missing); "
            "a table must be complete over the candidate widths: run `edgeprune profile`"
        )
