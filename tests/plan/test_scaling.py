import itertools

import numpy as np
import pytest

from edgeprune.errors import UsageError
from edgeprune.plan.scaling import (
    Accuracy,
    Polynomial,
    PowerLaw,
    best_points,
    elasticities,
    fit_accuracy,
    fit_latency,
    optimum,
)

PLANTED = Accuracy(
    (
        Polynomial(0.3, np.array([0.5, 0.8, 0.9, 0.93])),
        Polynomial(0.2, np.array([0.4, 0.85, 0.98, 1.0])),
        Polynomial(0.5, np.array([0.7, 0.9, 0.99, 1.0])),
    )
)
LAW = PowerLaw(10.0, np.array([0.9, 1.3, 1.6]))


def along_axes(lows, count=5):
    points = [(1.0, 1.0, 1.0)]
    for axis, low in enumerate(lows):
        for share in np.linspace(low, 1, count)[:-1]:
            point = [1.0, 1.0, 1.0]
            point[axis] = share
            points.append(tuple(point))
    return np.array(points)


def box(accuracy, count):
    return np.array(list(itertools.product(*(np.linspace(low, 1, count) for low in accuracy.lows))))


def test_a_planted_polynomial_is_recovered_from_samples_along_the_axes():
    points = along_axes(PLANTED.lows)
    found = fit_accuracy(points, PLANTED(points))
    for factor, planted in zip(found.factors, PLANTED.factors, strict=True):
        np.testing.assert_allclose(factor.coefficients, planted.coefficients, rtol=1e-6)
    everywhere = box(PLANTED, 9)
    np.testing.assert_allclose(found(everywhere), PLANTED(everywhere), rtol=1e-6)


def test_the_product_form_with_axis_samples_is_the_product_of_the_curves():
    points = along_axes(PLANTED.lows)
    found = fit_accuracy(points, PLANTED(points))
    d, w, r = 0.55, 0.45, 0.8
    curves = PLANTED([d, 1, 1]) * PLANTED([1, w, 1]) * PLANTED([1, 1, r]) / PLANTED([1, 1, 1]) ** 2
    np.testing.assert_allclose(found([d, w, r]), curves, rtol=1e-6)


def test_noise_never_makes_a_smaller_network_better():
    points = along_axes(PLANTED.lows, 6)
    noise = 0.05 * np.random.default_rng(0).standard_normal(len(points))
    found = fit_accuracy(points, PLANTED(points) + noise)
    for axis in range(3):
        line = np.ones((50, 3))
        line[:, axis] = np.linspace(found.lows[axis], 1, 50)
        assert (np.diff(found(line)) >= -1e-12).all()


def test_the_gradient_is_that_of_differences():
    at = np.array([0.6, 0.5, 0.7])
    for axis in range(3):
        step = np.eye(3)[axis] * 1e-6
        slope = (PLANTED(at + step) - PLANTED(at - step)) / 2e-6
        np.testing.assert_allclose(PLANTED.gradient(at)[axis], slope, rtol=1e-6)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4, 0.25])
def test_the_optimum_is_that_of_a_dense_grid(share):
    found = optimum(PLANTED, LAW, share * LAW.full_ms)
    assert LAW(found) <= share * LAW.full_ms * (1 + 1e-9)
    grid = box(PLANTED, 61)
    allowed = grid[LAW(grid) <= share * LAW.full_ms]
    best = allowed[np.argmax(PLANTED(allowed))]
    assert PLANTED(found) >= PLANTED(best) - 1e-9
    step = (1 - PLANTED.lows) / 60
    assert (np.abs(found - best) <= 2 * step).all()


def test_elasticities_agree_in_the_interior():
    found = optimum(PLANTED, LAW, 0.5 * LAW.full_ms)
    inside = (found > PLANTED.lows + 1e-6) & (found < 1 - 1e-6)
    assert inside.sum() >= 2
    common = elasticities(PLANTED, LAW, found)
    values = common[inside]
    assert np.ptp(values) < 1e-6 * values.max()
    at_top = found >= 1 - 1e-6
    assert (common[at_top] >= values.min() - 1e-6).all()


def test_the_whole_budget_is_the_original():
    np.testing.assert_array_equal(optimum(PLANTED, LAW, LAW.full_ms), np.ones(3))


def test_an_axis_that_does_not_matter_goes_alone_until_its_limit():
    flat = Accuracy((PLANTED.factors[0], PLANTED.factors[1], Polynomial(0.5, np.full(4, 1.0))))
    enough = LAW([1, 1, 0.7])
    np.testing.assert_allclose(optimum(flat, LAW, float(enough)), [1, 1, 0.7], atol=1e-4)
    beyond = optimum(flat, LAW, float(LAW([1, 1, 0.5])) * 0.8)
    assert beyond[2] == pytest.approx(0.5, abs=1e-6)
    assert beyond[:2].min() < 0.999


def test_a_power_law_is_recovered():
    points = box(PLANTED, 4)
    found = fit_latency(points, LAW(points))
    np.testing.assert_allclose([found.full_ms, *found.powers], [LAW.full_ms, *LAW.powers], rtol=1e-6)


def test_no_feasible_neighbour_on_the_grid_is_better():
    axes = [np.array([0.3, 0.5, 0.75, 1.0]), np.linspace(0.2, 1, 9), np.array([0.5, 0.625, 0.75, 0.875, 1.0])]
    grid = np.array(list(itertools.product(*axes)))
    stairs = LAW(grid) * (1 + 0.1 * np.sin(17 * grid.sum(1)))  # what is measured follows no law
    order = best_points(PLANTED, grid, stairs, 5.0)
    best = order[0]
    assert stairs[best] <= 5.0
    assert np.all(np.diff(PLANTED(grid[order])) <= 0)
    place = [int(np.argmin(abs(axes[i] - grid[best][i]))) for i in range(3)]
    for step in itertools.product((-1, 0, 1), repeat=3):
        at = [p + s for p, s in zip(place, step, strict=True)]
        if all(0 <= p < len(a) for p, a in zip(at, axes, strict=True)):
            point = np.array([a[p] for a, p in zip(axes, at, strict=True)])
            cost = stairs[np.flatnonzero((grid == point).all(1))[0]]
            assert cost > 5.0 or PLANTED(point) <= PLANTED(grid[best])


def test_an_axis_without_samples_is_held_to_be_without_effect():
    points = along_axes([1.0, 0.4, 1.0])
    points = np.unique(points, axis=0)
    found = fit_accuracy(points, 0.5 + 0.4 * points[:, 1])
    grid = np.array([[1, 0.4, 1], [1, 0.7, 1], [1, 1, 1]])
    np.testing.assert_allclose(found(grid), 0.5 + 0.4 * grid[:, 1], rtol=1e-9)
    assert best_points(found, grid, [1.0, 2.0, 3.0], 2.5).tolist() == [1, 0]
    alone = fit_accuracy(np.ones((1, 3)), [0.9])
    np.testing.assert_allclose(alone(np.ones((4, 3))), np.full(4, 0.9))
    assert best_points(alone, np.ones((2, 3)), [2.0, 1.0], 2.5).tolist() == [1, 0]


def test_points_where_nothing_was_sampled_are_not_chosen():
    grid = np.array([[0.1, 1, 1], [0.3, 1, 1]])
    assert best_points(PLANTED, grid, [1.0, 2.0], 5.0).tolist() == [1]


@pytest.mark.parametrize(
    ("points", "values", "says"),
    [
        (np.ones((1, 2)), [1.0], r"expected \(n, 3\)"),
        (np.array([[1, 1, 1], [0, 1, 1]]), [1.0, 1.0], r"\(0, 1\]"),
        (np.array([[0.5, 1, 1]]), [1.0], "measure it too"),
    ],
)
def test_samples_that_do_not_tell_enough(points, values, says):
    with pytest.raises(UsageError, match=says):
        fit_accuracy(points, values)


def test_a_budget_beyond_the_samples_is_refused():
    with pytest.raises(UsageError, match="sample smaller"):
        optimum(PLANTED, LAW, 0.01)
