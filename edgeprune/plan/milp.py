"""The integer programme of a Model, solved by scipy's HiGHS.

Source: the linearisation of two-variable tables over one-hot variables by their marginals (the local polytope of a
graphical model), with the budget as one row. A binary per state of a group or block; per table over two variables a
continuous mass per pair, whose sum along one side is the other side's one-hot; a removable block takes its mass out of
both sides. At integer points every mass is the product of the one-hots, so the programme is exact; the one-hot of a sum
is the mass of the pairs that make it, so it needs no binary either.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are first used: a third of a second that only planning needs

from edgeprune.plan.factors import Model

SCALE = 1000.0  # budget and objective are scaled to this: HiGHS's absolute tolerances are then relative ones of 1e-9


@dataclass(frozen=True, slots=True)
class Answer:
    """bound: proven lower bound of the objective (inf: infeasible); states: of every group and block, or None."""

    bound: float
    states: np.ndarray | None


_STDOUT = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS 1.12 prints a line of its own to the process's standard output now and then (HiGHS issue 2783), which
    would end up amid JSON or progress: meanwhile that goes nowhere."""
    with _STDOUT, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, AttributeError, ValueError):
            sys.stdout.flush()
            flush = ctypes.CDLL(None).fflush if os.name == "posix" else lambda _: None
            saved = os.dup(1)
            stack.callback(os.close, saved)
            flush(None)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, nowhere)
            os.dup2(nowhere, 1)
            stack.callback(os.dup2, saved, 1)
            stack.callback(flush, None)
        yield


class _Rows:
    def __init__(self) -> None:
        self.cost: list[float] = []
        self.binary: list[bool] = []
        self.triples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def columns(self, count: int, binary: bool = False) -> np.ndarray:
        first = len(self.binary)
        self.binary.extend([binary] * count)
        return np.arange(first, first + count)

    def rows(self, count: int, low: float, high: float) -> np.ndarray:
        first = len(self.low)
        self.low.extend([low] * count)
        self.high.extend([high] * count)
        return np.arange(first, first + count)

    def put(self, rows: np.ndarray, columns: np.ndarray, value: float | np.ndarray) -> None:
        rows, columns, values = np.broadcast_arrays(rows, columns, np.asarray(value, dtype=float))
        self.triples.append((rows.ravel(), columns.ravel(), values.ravel()))


def solve_milp(
    model: Model,
    *,
    minimise_latency: bool = False,
    cutoff: float = math.inf,
    gap: float,
    time_limit_s: float,
    threads: int = 1,
) -> Answer:
    """Minimise the damage within the budget (or the latency, without one). ``cutoff``: only plans below it matter."""
    started = time.perf_counter()
    rows = _Rows()
    n_choices = model.n_groups + model.n_blocks
    one_hot: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(model.variables)
    blocks_first = sorted(range(len(model.variables)), key=lambda i: (model.variables[i].kind != "block", i))
    for i in blocks_first:
        variable = model.variables[i]
        gone = variable.gone
        columns = rows.columns(variable.size - (gone is not None), binary=i < n_choices)
        if gone is not None and variable.block is not None:
            removed = one_hot[variable.block][model.variables[variable.block].states == 1]
            columns = np.concatenate([columns, removed])
        one_hot[i] = columns
        rows.put(rows.rows(1, 1, 1), columns, 1)

    budget_columns: list[np.ndarray] = []
    budget_values: list[np.ndarray] = []
    lost: dict[tuple[int, int], np.ndarray] = {}
    pairs: dict[tuple[int, int, int | None], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def charge(columns: np.ndarray, values: np.ndarray) -> None:
        budget_columns.append(columns.ravel())
        budget_values.append(np.asarray(values, dtype=float).ravel())

    def removed_column(block: int) -> np.ndarray:
        return one_hot[block][model.variables[block].states == 1]

    def lost_mass(i: int, block: int) -> np.ndarray:
        """Mass of every state of an outer variable while the block is removed."""
        if (i, block) not in lost:
            columns = rows.columns(model.variables[i].size)
            r = rows.rows(len(columns), -math.inf, 0)
            rows.put(r, columns, 1)
            rows.put(r, one_hot[i], -1)
            r = rows.rows(1, 0, 0)
            rows.put(r, columns, 1)
            rows.put(r, removed_column(block), -1)
            lost[i, block] = columns
        return lost[i, block]

    def live(i: int) -> int:
        return model.variables[i].size - (model.variables[i].gone is not None)

    def put_mass(r: np.ndarray, i: int, block: int | None, sign: float) -> None:
        """Live mass of the states of variable i while the block is kept, one row per state."""
        rows.put(r, one_hot[i][: live(i)], sign)
        if block is not None and model.variables[i].block is None and len(removed_column(block)):
            rows.put(r, lost_mass(i, block), -sign)

    def pair_mass(a: int, b: int, block: int | None, possible: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if (a, b, block) not in pairs:
            at = np.nonzero(possible)
            columns = rows.columns(len(at[0]))
            for i, position in ((a, at[0]), (b, at[1])):
                r = rows.rows(live(i), 0, 0)
                rows.put(r[position], columns, 1)
                put_mass(r, i, block, -1)
            pairs[a, b, block] = (columns, at[0], at[1])
        return pairs[a, b, block]

    for scope, table in model.latency.items():
        inner = [model.variables[i].block for i in scope if model.variables[i].block is not None]
        outer = [i for i in scope if model.variables[i].kind != "block"]
        switch = [i for i in scope if model.variables[i].kind == "block"]
        block = inner[0] if inner else switch[0] if switch else None
        if switch:
            kept = model.variables[switch[0]].states == 0
            if not kept.any():
                continue
            table = table.take(int(np.argmax(kept)), axis=scope.index(switch[0]))
        table = table[tuple(slice(live(i)) for i in outer)]
        if not outer:
            charge(one_hot[switch[0]][kept], table[None])
        elif len(outer) == 1:
            (i,) = outer
            charge(one_hot[i][: live(i)], table)
            if switch and len(removed_column(switch[0])):
                charge(lost_mass(i, switch[0]), -table)
        else:
            columns, u, v = pair_mass(outer[0], outer[1], block, np.isfinite(table))
            charge(columns, table[u, v])
    for s in model.sums:
        block = model.variables[s.total].block
        inside = s.states[: live(s.left), : live(s.right)]
        a, b, states = (s.left, s.right, inside) if s.left < s.right else (s.right, s.left, inside.T)
        columns, u, v = pair_mass(a, b, block, states >= 0)
        held = states[u, v] >= 0
        r = rows.rows(live(s.total), 0, 0)
        rows.put(r[states[u, v][held]], columns[held], 1)
        rows.put(r, one_hot[s.total][: live(s.total)], -1)

    n_columns = len(rows.binary)
    damage = np.zeros(n_columns)
    for columns, cost in zip(one_hot, model.damage, strict=True):
        damage[columns] += cost
    latency = np.zeros(n_columns)
    if budget_columns:
        np.add.at(latency, np.concatenate(budget_columns), np.concatenate(budget_values))
    if minimise_latency:
        objective, constant = latency, model.constant_ms
    else:
        objective, constant = damage, 0.0
        left_ms = model.budget_ms - model.constant_ms
        used = np.flatnonzero(latency)
        unit = SCALE / max(abs(left_ms), 1e-3 * float(np.abs(latency).max(initial=0.0)), 1e-12)
        rows.put(rows.rows(1, -math.inf, left_ms * unit), used, latency[used] * unit)
    finite = objective[(objective > 0) & (objective <= cutoff)]
    unit = SCALE / (cutoff if math.isfinite(cutoff) and cutoff > 0 else float(finite.max()) if len(finite) else 1.0)
    r, c, v = (np.concatenate(parts) for parts in zip(*rows.triples, strict=True))
    matrix = scipy.sparse.csr_array((v, (r, c)), shape=(len(rows.low), n_columns))
    binary = np.array(rows.binary)
    upper = np.ones(n_columns)
    if math.isfinite(cutoff) and not minimise_latency:
        upper[binary & (objective > cutoff)] = 0.0
    options = {
        "time_limit": max(0.01, time_limit_s - (time.perf_counter() - started)),
        "mip_rel_gap": gap,
        "mip_abs_gap": 1e-7,
        "parallel": threads > 1,
    }
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy hands options it does not know to HiGHS, with a warning
        warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
        result = scipy.optimize.milp(
            np.where(upper > 0, objective, 0.0) * unit,
            integrality=binary.astype(int),
            bounds=scipy.optimize.Bounds(np.zeros(n_columns), upper),
            constraints=scipy.optimize.LinearConstraint(matrix, np.array(rows.low), np.array(rows.high)),
            options=options,
        )
    if any(f"Status {n}:" in result.message for n in (8, 9)):  # infeasible; scipy's 2 is also a model HiGHS refuses
        return Answer(math.inf, None)
    dual = getattr(result, "mip_dual_bound", None)
    bound = -math.inf if dual is None or not math.isfinite(dual) else (float(dual) - 1e-6) / unit + constant
    if result.x is None:
        return Answer(bound, None)
    chosen = [int(np.argmax(result.x[one_hot[i]])) for i in range(n_choices)]
    return Answer(bound, np.array(chosen, dtype=np.int64))
