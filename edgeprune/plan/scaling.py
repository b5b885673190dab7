"""How deep, how wide, at what resolution: the three dimensions of a network's size, decided together.

Source: Wang et al., "Accurate and efficient network pruning in three dimensions" (ICML 2021). Accuracy is modelled as
    F(d, w, r) = f_d(d) f_w(w) f_r(r) / F(1, 1, 1)^2
each f a polynomial fitted to a few compressed networks, d, w, r in (0, 1] being shares of the original's depth, width
and resolution; the network is then scaled to where F is largest under the cost constraint. In the interior of the box
the elasticities agree there: d F_d / p_d = w F_w / p_w = r F_r / p_r for a cost ~ d^p_d w^p_w r^p_r.

Shapes: a point is (d, w, r); samples are (n, 3) points with (n,) accuracies; a grid is (m, 3) with (m,) milliseconds.

Deviations: the cost is measured latency instead of d w^2 r^2, so the real answer is picked from the grid of what can be
built (``best_points``), and the power law serves as the start and as a check. Each f is non-decreasing: written in
Bernstein form with non-decreasing coefficients, since noisy samples of short runs would else tell that a smaller one
is the better network. Rank one only: with samples along the axes higher ranks cannot be told apart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from edgeprune.errors import UsageError

AXES = ("depth", "width", "resolution")
SWEEPS = 500  # alternating fits
TOLERANCE = 1e-14


@dataclass(frozen=True, slots=True)
class Polynomial:
    """Non-decreasing on [low, 1]: Bernstein coefficients (degree + 1,), themselves non-decreasing."""

    low: float
    coefficients: np.ndarray

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        return bernstein(x, self.low, len(self.coefficients) - 1) @ self.coefficients

    def slope(self, x: float) -> float:
        degree = len(self.coefficients) - 1
        if degree == 0:
            return 0.0
        rises = np.diff(self.coefficients) * degree / (1 - self.low)
        return float(bernstein(x, self.low, degree - 1) @ rises)


def bernstein(x: np.ndarray | float, low: float, degree: int) -> np.ndarray:
    """(..., degree + 1) basis values on [low, 1]; beyond the interval it is held at its ends."""
    x = np.asarray(x, dtype=float)[..., None]
    t = np.clip((x - low) / (1 - low), 0.0, 1.0) if low < 1 else np.ones_like(x)
    k = np.arange(degree + 1)
    return np.array([math.comb(degree, i) for i in k]) * t**k * (1 - t) ** (degree - k)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """F(d, w, r), the product of three polynomials; trusted inside the box of its samples only."""

    factors: tuple[Polynomial, Polynomial, Polynomial]

    def __call__(self, points: np.ndarray | Sequence[float]) -> np.ndarray:
        """(..., 3) -> (...)."""
        x = np.asarray(points, dtype=float)
        return math.prod(f(x[..., i]) for i, f in enumerate(self.factors))  # type: ignore[return-value]

    @property
    def lows(self) -> np.ndarray:
        """(3,) the smallest shares that were sampled."""
        return np.array([f.low for f in self.factors])

    def gradient(self, point: Sequence[float]) -> np.ndarray:
        """(3,) at one point."""
        values = [float(f(x)) for f, x in zip(self.factors, point, strict=True)]
        slopes = [f.slope(x) for f, x in zip(self.factors, point, strict=True)]
        return np.array([slopes[i] * math.prod(values[:i] + values[i + 1 :]) for i in range(3)])


def fit_accuracy(
    points: np.ndarray, accuracies: Sequence[float], degree: int = 3, weights: Sequence[float] | None = None
) -> Accuracy:
    """Least squares of the product form by alternating over its factors, each fit exact (bounded linear least squares).

    points: (n, 3) with the original (1, 1, 1) among them; the degree of an axis is at most its number of distinct
        shares less one, so an axis without samples is held to be without effect
    weights: (n,) how far each sample is trusted
    Raises UsageError when the points do not tell anything.
    """
    x, y = np.asarray(points, dtype=float), np.asarray(accuracies, dtype=float)
    if x.ndim != 2 or x.shape[1] != 3 or len(x) != len(y) or not len(x):
        raise UsageError(
            f"samples of accuracy: got points of shape {x.shape} with {len(y)} accuracies, expected (n, 3)"
        )
    if not ((x > 0) & (x <= 1)).all() or not np.isfinite(y).all():
        raise UsageError("samples of accuracy: expected shares in (0, 1] and finite accuracies")
    if not (x == 1).all(1).any():
        raise UsageError("samples of accuracy: the original network, (1, 1, 1), is not among them; measure it too")
    root = np.sqrt(np.ones(len(y)) if weights is None else np.asarray(weights, dtype=float))
    lows = x.min(0)
    degrees = [min(degree, len(np.unique(x[:, i])) - 1) for i in range(3)]
    bases = [bernstein(x[:, i], lows[i], degrees[i]) for i in range(3)]
    steps = [np.tril(np.ones((d + 1, d + 1))) for d in degrees]  # non-negative rises -> non-decreasing coefficients
    scale = float(np.abs(y).max()) or 1.0
    rises = [np.eye(d + 1)[0] for d in degrees]
    rises[0] = rises[0] * scale
    error = math.inf
    for _ in range(SWEEPS):
        for i in range(3):
            others = math.prod(bases[j] @ steps[j] @ rises[j] for j in range(3) if j != i)
            system = (bases[i] @ steps[i]) * np.asarray(others)[:, None]
            rises[i] = scipy.optimize.lsq_linear(system * root[:, None], y * root, bounds=(0, np.inf), tol=1e-15).x
            if i:  # only the first factor carries the scale
                top = float((steps[i] @ rises[i])[-1])
                if top > 0:
                    rises[i], rises[0] = rises[i] / top, rises[0] * top
        fitted = math.prod(bases[i] @ steps[i] @ rises[i] for i in range(3))
        last, error = error, float((root**2 * (fitted - y) ** 2).sum())
        if last - error <= TOLERANCE * scale**2:
            break
    d, w, r = (Polynomial(float(low), s @ rise) for low, s, rise in zip(lows, steps, rises, strict=True))
    return Accuracy((d, w, r))


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """L(d, w, r) = full_ms d^p_d w^p_w r^p_r."""

    full_ms: float
    powers: np.ndarray

    def __call__(self, points: np.ndarray | Sequence[float]) -> np.ndarray:
        return self.full_ms * np.prod(np.asarray(points, dtype=float) ** self.powers, axis=-1)


def fit_latency(points: np.ndarray, latencies_ms: np.ndarray | Sequence[float]) -> PowerLaw:
    """Least squares in logarithms; powers are not negative."""
    x = np.log(np.asarray(points, dtype=float))
    system = np.column_stack([np.ones(len(x)), x])
    found = scipy.optimize.lsq_linear(system, np.log(latencies_ms), bounds=([-np.inf, 0, 0, 0], np.inf), tol=1e-15).x
    return PowerLaw(float(np.exp(found[0])), found[1:])


def optimum(accuracy: Accuracy, latency: PowerLaw, budget_ms: float) -> np.ndarray:
    """(3,) the point in the sampled box with the largest F within the budget.

    Solved in logarithms, where the budget is a plane, from several starts (F need not be concave). Raises UsageError
    when not even the smallest sampled network is within the budget.
    """
    low = np.log(accuracy.lows)
    allowed = math.log(budget_ms / latency.full_ms)
    if float(latency.powers @ low) > allowed + 1e-12:
        raise UsageError(
            f"not even the smallest sampled network is predicted within {budget_ms:.4g} ms; sample smaller ones"
        )
    if allowed >= 0:
        return np.ones(3)
    best = np.exp(low)
    for start in itertools.product((0.0, 0.5, 1.0), repeat=3):
        z = low * np.array(start)
        over = float(latency.powers @ z) - allowed
        if over > 0:  # along the line to the corner, until it fits
            z = z + (low - z) * min(1.0, over / max(float(latency.powers @ (z - low)), 1e-300))
        found = scipy.optimize.minimize(
            lambda z: -float(accuracy(np.exp(z))),
            z,
            jac=lambda z: -accuracy.gradient(np.exp(z)) * np.exp(z),
            bounds=[(v, 0.0) for v in low],
            constraints={
                "type": "ineq",
                "fun": lambda z: allowed - float(latency.powers @ z),
                "jac": lambda z: -latency.powers,
            },
            method="SLSQP",
            options={"ftol": 1e-16, "maxiter": 500},
        ).x
        point = np.exp(np.clip(found, low, 0.0))
        if float(latency(point)) <= budget_ms * (1 + 1e-9) and accuracy(point) > accuracy(best):
            best = point
    return best


def elasticities(accuracy: Accuracy, latency: PowerLaw, point: Sequence[float]) -> np.ndarray:
    """(3,) x F_x / p_x: equal among the axes that lie strictly inside their limits at an optimum."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(point) * accuracy.gradient(point) / latency.powers


def best_points(
    accuracy: Accuracy, grid: np.ndarray, latencies_ms: np.ndarray | Sequence[float], budget_ms: float
) -> np.ndarray:
    """Indices of the grid points within the budget, the most accurate first; of equals the faster first.

    grid: (m, 3) what can really be built, latencies_ms: (m,) by the table. Points outside the sampled box are left
    out, since nothing is known there.
    """
    points, cost = np.asarray(grid, dtype=float), np.asarray(latencies_ms, dtype=float)
    inside = (points >= accuracy.lows - 1e-9).all(1)
    allowed = np.flatnonzero(inside & (cost <= budget_ms))
    return allowed[np.lexsort((cost[allowed], -accuracy(points[allowed])))]
