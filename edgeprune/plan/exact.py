"""Widths and removed blocks of least damage within a latency budget, with a proven gap.

Source: Lagrangian relaxation of the one budget row with variable fixing (Everett 1963; Geoffrion 1974) before the
integer programme of plan/milp.py. With a price on latency the problem without a budget is solved exactly by
plan/eliminate.py; the price at which the budget is just met gives a lower bound, and every state whose least cost at
that price exceeds the best plan found can be dropped for good. What is left goes to HiGHS, often nothing.

The gap of a plan is ``(damage - bound) / max(damage, floor)``, where ``bound`` is a proven lower bound of the damage of
every plan within the budget and ``floor`` is 1e-9 of the largest single damage in the problem: differences
below that are zero for every purpose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from edgeprune.errors import BudgetUnreachableError, TableError, UsageError
from edgeprune.plan.eliminate import Elimination, TooWideError
from edgeprune.plan.factors import Model, build
from edgeprune.plan.improve import Improver
from edgeprune.plan.milp import solve_milp
from edgeprune.plan.problem import Plan, Plans, Problem, Trials

EASY = 3000  # cells that the integer programme takes in its stride
SCATTER = 24  # attempts at a better plan where more than that are left
SLACK = 1e-9  # relative: a sum of latencies this little above the budget is rounding


def evaluate(problem: Problem, widths: Mapping[str, int], removed: Iterable[str] = ()) -> tuple[float, float]:
    """Latency in ms and damage of a plan; groups not named keep everything, groups of removed blocks do not matter.

    Raises UsageError for a width that is no candidate or a name that does not exist, TableError for a missing count."""
    out = set(removed)
    unknown = out - {b.name for b in problem.blocks} or set(widths) - {g.name for g in problem.groups}
    if unknown:
        raise UsageError(f"the problem has no group or block named {sorted(unknown)[0]}")
    dead = [b.name in out for b in problem.blocks]
    chosen = {}
    damage = [b.damage for b, gone in zip(problem.blocks, dead, strict=True) if gone]
    for i, group in enumerate(problem.groups):
        width = widths.get(group.name, group.widths[-1])
        if width not in group.widths:
            raise UsageError(f"group {group.name}: width {width} is no candidate; the candidates are {group.widths}")
        chosen[i] = width
        if group.block is None or not dead[group.block]:
            damage.append(group.damage[group.widths.index(width)])
    latency = []
    for term in problem.terms:
        if term.block is None or not dead[term.block]:
            count = tuple(axis.at(chosen) for axis in term.axes)
            if count not in term.latency_ms:
                raise TableError(f"term {term.name} has no latency for channel counts {count}: run `edgeprune profile`")
            latency.append(term.latency_ms[count])
    return math.fsum(latency), math.fsum(damage)


def smallest(problem: Problem) -> float:
    """The lowest latency in ms that any widths and removed blocks reach, whatever the damage."""
    return _smallest(problem, build(problem))[0]


def _smallest(problem: Problem, model: Model) -> tuple[float, np.ndarray]:
    try:
        _, states = Elimination(model).minimise(0.0, 1.0)
    except TooWideError:
        answer = solve_milp(model, minimise_latency=True, gap=0.0, time_limit_s=math.inf)
        assert answer.states is not None
        states = answer.states
    return Improver(problem, model).latency(states), states


def exact(problem: Problem, trials: Trials | None = None) -> Plans:
    """The planner of this module: by the problem's additive damages alone, nothing is tried. Widths and blocks."""
    model = build(problem)

    def plan(budget_ms: float) -> Plan:
        asked = replace(problem, budget_ms=budget_ms)
        return _Search(asked, 5e-4, 15.0, 1, replace(model, budget_ms=budget_ms)).run()

    return plan


def solve(problem: Problem, *, gap: float = 5e-4, time_limit_s: float = 15.0, threads: int = 1) -> Plan:
    """The plan of least damage within ``problem.budget_ms``, as ``Plan(widths, removed, predicted_ms, damage, gap)``.

    Groups of removed blocks are not named in ``widths``. ``Plan.gap`` is what was proven (see above), above the
    ``gap`` asked for when the time ran out. Raises BudgetUnreachableError, naming the smallest reachable latency.
    """
    return _Search(problem, gap, time_limit_s, threads).run()


class _Search:
    def __init__(
        self, problem: Problem, gap: float, time_limit_s: float, threads: int, model: Model | None = None
    ) -> None:
        self.deadline = time.perf_counter() + time_limit_s
        self.problem, self.gap, self.threads = problem, gap, threads
        self.model = build(problem) if model is None else model
        self.improver = Improver(problem, self.model)
        self.floor = 1e-9 * max((float(d.max()) for d in self.model.damage), default=0.0)
        self.limit_ms = problem.budget_ms * (1 + SLACK) if problem.budget_ms > 0 else problem.budget_ms
        self.best: np.ndarray | None = None  # original states of groups and blocks
        self.damage = math.inf
        self.bound = 0.0  # damages are not negative
        self.excluded = math.inf  # no plan that fixing excluded has less damage than this

    def run(self) -> Plan:
        least_ms, states = _smallest(self.problem, self.model)
        if least_ms > self.limit_ms:
            raise BudgetUnreachableError(
                f"no plan reaches {self.problem.budget_ms:.6g} ms: the smallest reachable latency is "
                f"{least_ms:.6g} ms; ask for that or more"
            )
        self._offer(self.model, states)
        model = self.model
        try:
            while not self._done():
                before = sum(v.size for v in model.variables)
                model = self._fix(model)
                if model.empty or sum(v.size for v in model.variables) > 0.9 * before:
                    break
        except TooWideError:
            pass
        if model.empty:
            self.bound = max(self.bound, min(self.excluded, self.damage))
        elif not self._done():
            self._branch(model)
        assert self.best is not None
        return self._plan(self.best)

    def _done(self) -> bool:
        return self._gap() <= self.gap or time.perf_counter() > self.deadline

    def _gap(self) -> float:
        if self.damage <= self.bound:
            return 0.0
        return (self.damage - self.bound) / max(self.damage, self.floor)

    def _offer(self, model: Model, states: np.ndarray) -> tuple[float, float]:
        """Take a solution as the best plan if it is, after improving it. Its latency and damage as offered."""
        count = model.n_groups + model.n_blocks
        original = np.array([model.variables[i].states[states[i]] for i in range(count)])
        latency, damage = self.improver.latency(original), self.improver.damage(original)
        if latency <= self.limit_ms:
            better, value = self.improver.improve(original, self.limit_ms)
            if value < self.damage:
                self.best, self.damage = better, value
        return latency, damage

    def _raise_bound(self, bound: float) -> None:
        self.bound = max(self.bound, min(bound, self.excluded, self.damage))

    def _fix(self, model: Model) -> Model:
        """Find the price at which the budget binds, raise the bound, and drop the states that cannot lie in a plan
        worth having."""
        tree = Elimination(model)
        budget = self.limit_ms
        value, states = tree.minimise(1.0, 0.0)
        if math.isinf(value):
            return model.restrict([np.zeros(v.size, bool) for v in model.variables])
        self._raise_bound(value)
        high = self._offer(model, states)  # over the budget, least damage
        if high[0] <= self.limit_ms:
            return model
        _, states = tree.minimise(0.0, 1.0)
        low = self._offer(model, states)  # within it, if anything is
        if low[0] > self.limit_ms:
            return model.restrict([np.zeros(v.size, bool) for v in model.variables])
        price = 0.0
        for _ in range(60):
            if low[1] <= high[1] or time.perf_counter() > self.deadline:
                break
            price = (low[1] - high[1]) / (high[0] - low[0])
            value, states = tree.minimise(1.0, price)
            value += price * (model.constant_ms - budget)
            self._raise_bound(value)
            point = self._offer(model, states)
            if point[1] + price * point[0] >= (high[1] + price * high[0]) * (1 - 1e-12):
                break
            if point[0] <= self.limit_ms:
                low = point
            else:
                high = point
        if self._done():
            return model
        value, marginals = tree.marginals(1.0, price)
        least = [m + price * (model.constant_ms - budget) for m in marginals]
        tolerance = 1e-10 * (abs(value) + abs(price * budget))
        kept = self._keep(model, least, tolerance)
        if kept.cells > EASY and self._gap() > self.gap:
            self._scatter(tree, price)
            kept = self._keep(model, least, tolerance)
        return kept

    def _keep(self, model: Model, least: list[np.ndarray], tolerance: float) -> Model:
        """The states whose plans may be better than the best by what is asked, at least."""
        threshold = self.damage * (1 - 0.5 * self.gap)
        self.excluded = min(self.excluded, threshold)
        return model.restrict([m <= threshold + tolerance for m in least])

    def _scatter(self, tree: Elimination, price: float) -> None:
        """Look for plans between the two that the price yields: with slightly changed damages, choices that are alike
        (the blocks of a stage) no longer all tip at the same price."""
        rng = np.random.default_rng(0)
        for attempt in range(SCATTER):
            spread = (0.01, 0.03, 0.1)[attempt % 3]
            jitter = [np.exp(rng.normal(0, spread, d.shape)) for d in tree.model.damage]
            low, high = price / (1 + 3 * spread), price * (1 + 3 * spread)
            for _ in range(5):
                middle = math.sqrt(low * high)
                _, states = tree.minimise(1.0, middle, jitter)
                if self._offer(tree.model, states)[0] <= self.limit_ms:
                    high = middle
                else:
                    low = middle
            if self._done():
                return

    def _branch(self, model: Model) -> None:
        """Solve what is left as an integer programme; again while the best plan falls, because the solver's absolute
        tolerances are relative to the best plan it is given."""
        budget, tightened = model.budget_ms, False
        for _ in range(10):
            remaining = self.deadline - time.perf_counter()
            if remaining <= 0:
                return
            cutoff = self.damage
            model.budget_ms = budget * (1 - 4 * SLACK if tightened else 1 + SLACK)
            answer = solve_milp(model, cutoff=cutoff, gap=0.5 * self.gap, time_limit_s=remaining, threads=self.threads)
            if not tightened:
                self._raise_bound(answer.bound)
            over = answer.states is not None and self._offer(model, answer.states)[0] > self.limit_ms
            if over and not tightened:
                tightened = True  # the solver's tolerance let it exceed the budget
            elif self._gap() <= self.gap or self.damage > 0.5 * cutoff:
                return

    def _plan(self, states: np.ndarray) -> Plan:
        removed = tuple(b.name for i, b in enumerate(self.problem.blocks) if states[len(self.problem.groups) + i] == 1)
        gone = {b.name for b in self.problem.blocks} & set(removed)
        widths = {
            g.name: g.widths[states[i]]
            for i, g in enumerate(self.problem.groups)
            if g.block is None or self.problem.blocks[g.block].name not in gone
        }
        predicted_ms, damage = evaluate(self.problem, widths, removed)
        return Plan(widths=widths, removed=removed, predicted_ms=predicted_ms, damage=damage, gap=self._gap())
