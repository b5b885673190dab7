"""Least squares on Gram matrices: ridge refits, and the elimination kernel behind the closed-form selections.

Source: methods.md of the design, 'Shared kernel' (optimal brain surgeon down-dates) and CaP (Xie et al., 2021).
With G = A^T A (p x p) and the targets fitted by Lam = G^-1 A^T B, dropping the columns k of a block raises the residual
by ``tr(Lam_k^T (H_kk)^-1 Lam_k)``, H = G^-1; then H and Lam are down-dated instead of refitted.
Deviations: blocks of columns instead of single ones (all taps of a channel go together); several systems share their
blocks (a channel read by several layers); all arithmetic float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


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
    scale = float(g.diagonal()[:-1].mean()) if len(g) > 1 else 1.0
    scale = scale if scale > 0 else 1.0
    penalty = torch.full((len(g),), scale * max(ridge, 1e-12), dtype=g.dtype, device=g.device)
    penalty[-1] = 1e-9 * float(g[-1, -1]) + 1e-12
    while True:
        factor, info = torch.linalg.cholesky_ex(g + torch.diag(penalty))
        if int(info) == 0:
            return lambda cross: torch.cholesky_solve(cross, factor)
        penalty = penalty * 10 + 1e-12 * scale


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
    """One consumer's least-squares problem: Gram matrix (p, p), fitted weight (p, outputs), the energy its residuals
    are measured by, and the columns of every unit, (units, block)."""

    gram: Tensor
    weight: Tensor
    energy: float
    columns: Tensor


class Elimination:
    """Units are dropped from all systems at once; each keeps the best weights for what is left."""

    def __init__(self, systems: Sequence[System], ridge: float = 1e-6) -> None:
        self.systems = list(systems)
        self.alive = torch.ones(len(systems[0].columns), dtype=torch.bool)
        self.ridge = ridge
        self.damage = 0.0
        self._factor()

    def _factor(self) -> None:
        """(Re)compute inverses of the Gram matrices with all units in."""
        self.inverses, self.weights = [], []
        for s in self.systems:
            g = s.gram.double().clone()
            scale = float(g.diagonal().mean())
            g.diagonal().add_(self.ridge * (scale if scale > 0 else 1.0))
            factor = torch.linalg.cholesky(g)
            self.inverses.append(torch.cholesky_inverse(factor))
            self.weights.append(s.weight.double().clone())

    def increases(self) -> Tensor:
        """(units,) how much the sum of relative residuals grows when a unit goes; inf for units that are gone."""
        total = torch.zeros(len(self.alive), dtype=torch.float64)
        units = self.alive.nonzero().ravel()
        for s, h, lam in zip(self.systems, self.inverses, self.weights, strict=True):
            block = s.columns[units]  # (u, b)
            corner = h[block[:, :, None], block[:, None, :]]
            part = lam[block]  # (u, b, outputs)
            total[units] += (part * torch.linalg.solve(corner, part)).sum((1, 2)) / s.energy
        total[~self.alive] = float("inf")
        return total.clamp_min(0)

    def drop(self, units: Sequence[int]) -> float:
        """Drop units together; the growth of the summed relative residual."""
        growth = 0.0
        for i, s in enumerate(self.systems):
            block = s.columns[torch.as_tensor(list(units))].reshape(-1)
            h, lam = self.inverses[i], self.weights[i]
            corner = h[block][:, block]
            solved = torch.linalg.solve(corner, torch.cat([h[block], lam[block]], 1))
            growth += float((lam[block] * solved[:, h.shape[1] :]).sum()) / s.energy
            side = h[:, block]
            h = h - side @ solved[:, : h.shape[1]]
            lam = lam - side @ solved[:, h.shape[1] :]
            gone = s.columns[~self.alive].reshape(-1).tolist() + block.tolist()
            h[gone], h[:, gone], lam[gone] = 0.0, 0.0, 0.0
            h[gone, gone] = 1.0  # keeps later corners regular; never read again
            self.inverses[i], self.weights[i] = h, lam
        self.alive[list(units)] = False
        self.damage += max(growth, 0.0)
        return max(growth, 0.0)
