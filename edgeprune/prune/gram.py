"""Least squares on Gram matrices: ridge refits, and the pivots behind all closed-form selections.

Source: the down-dates of optimal brain surgeon (Hassibi and Stork, 1993) and the up-dates of orthogonal matching
pursuit (Pati et al., 1993). Both are one step, the pivot on a block k of a symmetric matrix M (p, p) with right-hand
sides R (p, outputs); the squared residual changes by ``tr(R_k^T M_kk^-1 R_k)``:

    M <- M - M_:k M_kk^-1 M_k:      R <- R - M_:k M_kk^-1 R_k:

    Elimination  M = (A^T A)^-1, R = the fitted weights: the columns k leave, the residual grows
    Selection    M = A^T A, R = A^T B: the columns k enter, the residual shrinks; R stays A^T times the residual

Deviations: blocks of columns instead of single ones (all taps of a channel go together); several systems share their
blocks (a channel read by several layers); a ridge draws towards the present weights; all arithmetic float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
REFACTOR = 64  # down-dates before inverses are computed afresh
CLEARED = 1e-3  # or when the largest entry of the inverses has shrunk this much
TOGETHER = 1.5  # units dropped together may cost this much more than the sum of each alone, or gain less
TINY = 1e-12
ROUNDS = 256  # steps of a greedy selection; of more units, several go at a time


def gram(rows: Tensor, other: Tensor | None = None, chunk: int = 8192) -> Tensor:
    """``rows^T other`` (default: rows), (p, q) float64, products in float32 over chunks, sums in float64."""
    other = rows if other is None else other
    total = torch.zeros(rows.shape[-1], other.shape[-1], dtype=torch.float64, device=rows.device)
    for i in range(0, len(rows), chunk):
        total += (rows[i : i + chunk].T @ other[i : i + chunk]).double()
    return total


def ridge_step(rows: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """The change D (p, outputs) of a packed weight minimising ``|rows D - residual|^2 + r |D|^2`` with
    r = ridge * mean diagonal of the Gram matrix; the bias column is not held back.

    rows (n, p) with ones last, residual (n, outputs). Fewer rows than columns: the n x n dual system is solved.
    """
    n, p = rows.shape
    if n < p:
        return _dual_step(rows, residual, ridge)
    return solve_ridge(gram(rows), gram(rows, residual), ridge).to(rows.dtype)


def ridge_solver(g: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """``cross -> (g + r I)^-1 cross`` in float64, r = ridge * mean diagonal; the last column (the bias) gets a tiny r
    only. A matrix that is not positive definite gets ten times the ridge until it is."""
    return solver(g, penalties(g, max(ridge, 1e-12)))


def solver(g: Tensor, penalty: Tensor) -> Callable[[Tensor], Tensor]:
    """``cross -> (g + diag(penalty))^-1 cross``; see ``ridge_solver``."""
    factor = _factor(g, penalty)
    return lambda cross: torch.cholesky_solve(cross, factor)


def penalties(g: Tensor, ridge: float, bias: bool = True) -> Tensor:
    """(p,) what a ridge adds to the diagonal: ``ridge`` times its mean; a bias (the last column) gets a trace of it."""
    free = int(bias and len(g) > 1)
    scale = float(g.diagonal()[: len(g) - free].mean())
    penalty = torch.full((len(g),), ridge * (scale if scale > 0 else 1.0), dtype=g.dtype, device=g.device)
    if free:
        penalty[-1] = 1e-9 * float(g[-1, -1]) + 1e-12
    return penalty


def _factor(g: Tensor, penalty: Tensor) -> Tensor:
    """Cholesky factor of ``g + diag(penalty)``, with ten times the penalty as often as it takes."""
    while True:
        factor, info = torch.linalg.cholesky_ex(g + torch.diag(penalty))
        if int(info) == 0:
            return factor
        penalty = penalty * 10 + 1e-12 * (float(g.diagonal().mean()) or 1.0)


def solve_ridge(g: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """``ridge_solver(g, ridge)(cross)``."""
    return ridge_solver(g, ridge)(cross)


def _dual_step(rows: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """As ridge_step through the n x n system, means taken out so that the bias stays free."""
    a, b = rows[:, :-1], residual
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    k = (a @ a.T).double()
    scale = float(rows[:, :-1].square().mean()) * len(rows)
    k.diagonal().add_(max(ridge, 1e-8) * max(scale, 1e-30))
    step = a.T @ torch.cholesky_solve(b.double(), torch.linalg.cholesky(k)).to(rows.dtype)
    return torch.cat([step, (mean_b - mean_a @ step)[None]])


@dataclass
class System:
    """A least-squares problem that the present weights solve exactly: targets ``A weight``.

    gram (p, p) A^T A; weight (p, outputs); energy: what residuals are told relative to; columns (units, block): where
    each unit's columns lie; bias: whether the last column is the constant, which no ridge holds back.
    """

    gram: Tensor
    weight: Tensor
    energy: float
    columns: Tensor
    bias: bool = False


def residuals(system: System, order: Sequence[int], ridge: float = 0.0) -> Tensor:
    """(units + 1,) the relative residual when only the first w units of ``order`` are in the fit, for every w: all
    pivots along an order known beforehand are one Cholesky factorisation."""
    rest = torch.ones(len(system.gram), dtype=torch.bool)
    rest[system.columns.reshape(-1)] = False
    first, blocks = rest.nonzero().ravel(), system.columns[torch.as_tensor(list(order))]
    index = torch.cat([first, blocks.reshape(-1)])
    g = system.gram.double()[index][:, index]
    penalty = penalties(system.gram.double(), ridge, system.bias)[index] * float(ridge > 0)
    steps = _factor(g, penalty).T @ system.weight.double()[index]  # L^-1 (L L^T W)
    left = steps.square().sum(1).flip(0).cumsum(0).flip(0) / system.energy
    return torch.cat([left[len(first) :: blocks.shape[1]], torch.zeros(1, dtype=torch.float64)])


class _Pivots:
    """Units are taken out of all systems' matrices at once; see the module's docstring."""

    def __init__(self, systems: Sequence[System], ridge: float) -> None:
        self.systems = list(systems)
        self.alive = torch.ones(len(systems[0].columns), dtype=torch.bool)
        self.penalties = [penalties(s.gram.double(), ridge, s.bias) for s in self.systems]
        self.matrices: list[Tensor] = []
        self.sides: list[Tensor] = []

    def changes(self) -> Tensor:
        """(units,) by how much the sum of relative residuals would change for each unit alone; nan for those gone."""
        total = torch.full((len(self.alive),), float("nan"), dtype=torch.float64)
        units = self.alive.nonzero().ravel()
        total[units] = 0.0
        for s, m, r in zip(self.systems, self.matrices, self.sides, strict=True):
            block = s.columns[units]  # (u, b)
            corner = m[block[:, :, None], block[:, None, :]]
            part = r[block]  # (u, b, outputs)
            total[units] += (part * torch.linalg.solve(corner, part)).sum((1, 2)) / s.energy
        return total.clamp_min(0)

    def change(self, units: Sequence[int]) -> float:
        """The change for several units together."""
        total = 0.0
        for s, m, r in zip(self.systems, self.matrices, self.sides, strict=True):
            block = s.columns[list(units)].reshape(-1)
            total += float((r[block] * torch.linalg.solve(m[block][:, block], r[block])).sum()) / s.energy
        return max(total, 0.0)

    def pivot(self, units: Sequence[int]) -> float:
        """Take units out together; the change."""
        change = self.change(units)
        self.alive[list(units)] = False
        for i, s in enumerate(self.systems):
            block = s.columns[list(units)].reshape(-1)
            m, r = self.matrices[i], self.sides[i]
            side = torch.linalg.solve(m[block][:, block], m[block]).T  # (p, b)
            r -= side @ r[block]
            m -= side @ m[block]
            m[block], m[:, block], r[block] = 0.0, 0.0, 0.0
        return change


class Selection(_Pivots):
    """Units are taken into the fit, which starts empty: ``sides`` are the columns' products with what is left to be
    explained, ``explained`` is the sum of relative residuals gone so far."""

    def __init__(self, systems: Sequence[System], ridge: float = 1e-10) -> None:
        super().__init__(systems, ridge)
        self.matrices = [s.gram.double() + torch.diag(d) for s, d in zip(self.systems, self.penalties, strict=True)]
        self.sides = [m @ s.weight.double() for s, m in zip(self.systems, self.matrices, strict=True)]
        self.explained = 0.0

    def add(self, units: Sequence[int]) -> None:
        self.explained += self.pivot(units)

    def order(self, score: Callable[[Selection], Tensor], rounds: int = ROUNDS) -> list[int]:
        """All units, each time the one (of many, a few) with the highest ``score(self)`` (units,) among those left."""
        picked: list[int] = []
        while len(picked) < len(self.alive):
            scores = torch.where(self.alive, score(self), -float("inf"))
            count = min(max(1, len(scores) // rounds), len(scores) - len(picked))
            chosen = scores.topk(count).indices.tolist()
            while count > 1 and TOGETHER * self.change(chosen) < float(self.changes()[chosen].sum()) - TINY:
                count //= 2  # they explain the same
                chosen = chosen[:count]
            self.add(chosen)
            picked += chosen
        return picked


class Elimination(_Pivots):
    """Units are dropped, and the others get the best ``weights`` without them; ``damage`` is the sum of relative
    residuals. Down-dates lose digits, so the inverses are computed afresh every so often, and when the units that made
    a matrix nearly singular are gone."""

    def __init__(self, systems: Sequence[System], ridge: float = 1e-6) -> None:
        super().__init__(systems, ridge)
        self.damage = 0.0
        self._refactor()

    @property
    def inverses(self) -> list[Tensor]:
        return self.matrices

    @property
    def weights(self) -> list[Tensor]:
        return self.sides

    def increases(self) -> Tensor:
        """(units,) how much the sum of relative residuals grows when a unit goes; inf for units that are gone."""
        return self.changes().nan_to_num(nan=float("inf"))

    def drop(self, units: Sequence[int]) -> float:
        """Drop units together; the growth of the summed relative residual."""
        growth = self.pivot(units)
        self.damage += growth
        self.age += 1
        if self.age >= REFACTOR or any(a < CLEARED * b for a, b in zip(self._largest(), self.worst, strict=True)):
            self._refactor()
        return growth

    def order(self, rounds: int = ROUNDS) -> tuple[list[int], list[float]]:
        """(units by removal, ``damage`` after each), all but the last one. Units are dropped one at a time, or so many
        that about ``rounds`` rounds suffice, but only as many together as hurt little more than each alone."""
        chunk = max(1, len(self.alive) // rounds)
        removed: list[int] = []
        damage: list[float] = []
        while int(self.alive.sum()) > 1:
            increases = self.increases()
            count = min(chunk, int(self.alive.sum()) - 1)
            chosen = increases.topk(count, largest=False, sorted=True).indices
            while count > 1 and self.change(chosen.tolist()) > TOGETHER * float(increases[chosen].sum()) + TINY:
                count //= 2
                chosen = chosen[:count]
            before = self.damage
            self.drop(chosen.tolist())
            shares = increases[chosen] + TINY
            removed += chosen.tolist()
            damage += (before + (self.damage - before) * (shares.cumsum(0) / shares.sum())).tolist()
        return removed, damage

    def _largest(self) -> list[float]:
        return [float(m.diagonal().max()) for m in self.matrices]

    def _refactor(self) -> None:
        self.matrices, self.sides = [], []
        for s, penalty in zip(self.systems, self.penalties, strict=True):
            g, weight = s.gram.double(), s.weight.double()
            stays = torch.ones(len(g), dtype=torch.bool)
            stays[s.columns[~self.alive].reshape(-1)] = False
            inverse = torch.cholesky_inverse(_factor(g[stays][:, stays], penalty[stays]))
            m, r = torch.zeros_like(g), torch.zeros_like(weight)
            m[stays.nonzero(), stays.nonzero().T] = inverse
            r[stays] = weight[stays] + inverse @ (g[stays][:, ~stays] @ weight[~stays])
            self.matrices.append(m)
            self.sides.append(r)
        self.age, self.worst = 0, self._largest()
