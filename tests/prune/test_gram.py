"""The elimination kernel and the ridge refits against brute-force refits in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeprune.prune.gram import Elimination, Selection, System, gram, residuals, ridge_step, solve_ridge


def system(seed, n=200, units=6, block=3, outputs=5):
    generator = torch.Generator().manual_seed(seed)
    p = units * block + 1
    rows = torch.randn(n, p, generator=generator, dtype=torch.float64)
    rows[:, :-1] += 0.7 * rows[:, [0]]  # correlated, so that compensation matters
    rows[:, -1] = 1
    weight = torch.randn(p, outputs, generator=generator, dtype=torch.float64)
    columns = torch.arange(units * block).reshape(block, units).T.contiguous()  # taps outermost, as in patches.py
    energy = float((rows @ weight).square().sum())
    return rows, System(rows.T @ rows, weight, energy, columns)


def brute_force(rows, s, gone):
    """Relative residual of the best weights without the columns of ``gone``."""
    stays = [c for c in range(rows.shape[1]) if c not in set(s.columns[list(gone)].reshape(-1).tolist())]
    target = (rows @ s.weight).numpy()
    a = rows[:, stays].numpy()
    solution = np.linalg.lstsq(a, target, rcond=None)[0]
    return float(np.square(target - a @ solution).sum()) / s.energy, solution, stays


@pytest.mark.parametrize("seed", range(4))
def test_every_increase_equals_a_refit(seed):
    rows, s = system(seed)
    kernel = Elimination([s], ridge=0.0)
    gone = []
    for _ in range(5):
        increases = kernel.increases()
        before = brute_force(rows, s, gone)[0] if gone else 0.0
        for unit in range(6):
            if unit in gone:
                assert increases[unit] == float("inf")
            else:
                refit = brute_force(rows, s, [*gone, unit])[0] - before
                assert float(increases[unit]) == pytest.approx(refit, rel=1e-8, abs=1e-10)
        unit = int(increases.argmin())
        growth = kernel.drop([unit])
        assert growth == pytest.approx(float(increases[unit]), rel=1e-8)
        gone.append(unit)
        residual, solution, stays = brute_force(rows, s, gone)
        assert kernel.damage == pytest.approx(residual, rel=1e-8)
        np.testing.assert_allclose(kernel.weights[0][stays].numpy(), solution, rtol=1e-8, atol=1e-9)
        assert float(kernel.weights[0][s.columns[gone].reshape(-1)].abs().max()) == 0


def test_dropping_together_equals_dropping_in_turn_and_a_fresh_inverse():
    rows, s = system(7)
    together, turn = Elimination([s], ridge=0.0), Elimination([s], ridge=0.0)
    together.drop([1, 4])
    turn.drop([4])
    turn.drop([1])
    assert together.damage == pytest.approx(turn.damage, rel=1e-9)
    torch.testing.assert_close(together.weights[0], turn.weights[0], rtol=1e-9, atol=1e-9)
    stays = [c for c in range(19) if c not in set(s.columns[[1, 4]].reshape(-1).tolist())]
    fresh = torch.linalg.inv((rows.T @ rows)[stays][:, stays])
    torch.testing.assert_close(together.inverses[0][stays][:, stays], fresh, rtol=1e-8, atol=1e-12)


def test_several_systems_add_up():
    _, a = system(1)
    _, b = system(2, outputs=3)
    both = Elimination([a, b], ridge=0.0).increases()
    alone = Elimination([a], ridge=0.0).increases() + Elimination([b], ridge=0.0).increases()
    torch.testing.assert_close(both, alone)


def test_duplicated_and_dead_units_go_first_and_for_free():
    rows, _ = system(3)
    rows[:, [2, 8, 14]] = rows[:, [0, 6, 12]]  # unit 2 repeats unit 0
    rows[:, [5, 11, 17]] = 0  # unit 5 is dead
    weight = torch.randn(19, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = torch.arange(18).reshape(3, 6).T.contiguous()
    energy = float((rows @ weight).square().sum())
    kernel = Elimination([System(rows.T @ rows, weight, energy, columns)], ridge=1e-9)
    first = int(kernel.increases().argmin())
    assert first == 5
    kernel.drop([first])
    second = int(kernel.increases().argmin())
    assert second in (0, 2)
    kernel.drop([second])
    assert kernel.damage < 1e-6
    other = 2 if second == 0 else 0
    expected = weight[columns[0]] + weight[columns[2]]
    torch.testing.assert_close(kernel.weights[0][columns[other]], expected, rtol=1e-4, atol=1e-4)
    assert float(kernel.increases()[1]) > 1e-3


@pytest.mark.parametrize(("n", "p"), [(400, 30), (25, 60)])
def test_ridge_step_minimises_its_objective(n, p):
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, p, generator=generator)
    rows[:, -1] = 1
    residual = torch.randn(n, 3, generator=generator) + 5  # the bias must take the mean
    step = ridge_step(rows, residual, 1e-2).double()
    scale = float(gram(rows).diagonal()[:-1].mean()) * 1e-2
    error = residual.double() - rows.double() @ step
    gradient = rows.double().T @ error - scale * torch.cat([step[:-1], torch.zeros(1, 3, dtype=torch.float64)])
    assert float(gradient.abs().max()) < 2e-3 * float((rows.double().T @ residual.double()).abs().max())
    assert float(error.mean(0).abs().max()) < 1e-3


def test_primal_and_dual_agree():
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(40, 41, generator=generator)
    rows[:, -1] = 1
    residual = torch.randn(40, 3, generator=generator)
    dual = ridge_step(rows, residual, 1e-2)
    primal = solve_ridge(gram(rows), gram(rows, residual), 1e-2).float()
    torch.testing.assert_close(dual, primal, rtol=2e-2, atol=2e-3)


def test_rank_deficient_gram_is_solved():
    rows = torch.ones(10, 4)
    step = solve_ridge(gram(rows), gram(rows, torch.full((10, 1), 3.0)), 1e-3)
    assert torch.isfinite(step).all()
    torch.testing.assert_close((rows.double() @ step), torch.full((10, 1), 3.0, dtype=torch.float64), rtol=1e-2, atol=0)


def test_gram_in_chunks_equals_one_product():
    rows = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(rows, chunk=64), (rows.double().T @ rows.double()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_every_gain_of_a_selection_equals_a_refit(seed):
    """Units enter one by one beside nothing else; the constant column enters with them only where it is a unit."""
    rows, s = system(seed)
    rows, weight = rows[:, :-1], s.weight[:-1]
    s = System(rows.T @ rows, weight, float((rows @ weight).square().sum()), s.columns)
    target = (rows @ weight).numpy()
    kernel = Selection([s], ridge=0.0)
    inside = []
    for _ in range(6):
        changes = kernel.changes()
        for unit in range(6):
            if unit in inside:
                assert torch.isnan(changes[unit])
                continue
            fits = []
            for units in (inside, [*inside, unit]):
                a = rows[:, s.columns[units].reshape(-1)].numpy()
                fits.append(np.square(target - a @ np.linalg.lstsq(a, target, rcond=None)[0]).sum())
            assert float(changes[unit]) == pytest.approx((fits[0] - fits[1]) / s.energy, rel=1e-8, abs=1e-12)
        inside.append(int(changes.nan_to_num(nan=-1).argmax()))
        kernel.add(inside[-1:])
        a = rows[:, s.columns[inside].reshape(-1)].numpy()
        left = target - a @ np.linalg.lstsq(a, target, rcond=None)[0]
        outside = [c for c in range(18) if c not in s.columns[inside].reshape(-1).tolist()]
        np.testing.assert_allclose(kernel.sides[0][outside], rows[:, outside].T.numpy() @ left, rtol=1e-7, atol=1e-8)
    assert kernel.explained == pytest.approx(1, rel=1e-9)


def test_residuals_along_an_order_equal_refits():
    """With several columns a unit and a constant column that is always in the fit."""
    rows, s = system(4)
    order = [3, 0, 5, 1, 4, 2]
    found = residuals(s, order)
    assert len(found) == 7
    assert found[6] == 0
    for width in range(6):
        assert float(found[width]) == pytest.approx(brute_force(rows, s, order[width:])[0], rel=1e-8)


def test_residuals_with_a_ridge_are_what_elimination_finds():
    _, s = system(5)
    s.bias = True
    kernel = Elimination([s], ridge=0.05)
    found = residuals(s, [2, 5, 0, 4, 1, 3], ridge=0.05)
    for width, unit in zip(range(5, 0, -1), [3, 1, 4, 0, 5], strict=True):
        kernel.drop([unit])
        assert kernel.damage == pytest.approx(float(found[width]), rel=1e-9)


def test_no_ridge_holds_the_constant_column_back():
    """A unit that is nothing but a large mean is hardly a loss: the bias makes up for it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 5, generator=generator, dtype=torch.float64) * 30
    rows[:, 2] = 50 + 1e-3 * rows[:, 2]
    rows[:, 4] = 1
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    deviations = rows @ weight - (rows @ weight).mean(0)
    s = System(rows.T @ rows, weight, float(deviations.square().sum()), torch.arange(4)[:, None], bias=True)
    kernel, held_back = Elimination([s], ridge=1e-2), Elimination([replace(s, bias=False)], ridge=1e-2)
    assert int(kernel.increases().argmin()) == 2
    kernel.drop([2])
    held_back.drop([2])
    assert kernel.damage < 0.05 < 10 * kernel.damage < held_back.damage
    torch.testing.assert_close(kernel.weights[0][4], weight[4] + 50 * weight[2], rtol=1e-2, atol=1e-2)
    assert float((held_back.weights[0][4] - weight[4] - 50 * weight[2]).abs().max()) > 10


def test_twins_are_not_dropped_together():
    """A round of several units must not take two that are only dispensable one at a time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 40, generator=generator, dtype=torch.float64)
    rows[:, 20:] = rows[:, :20]
    weight = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    s = System(rows.T @ rows, weight, float((rows @ weight).square().sum()), torch.arange(40)[:, None])
    removed, damage = Elimination([s], ridge=1e-9).order(rounds=5)
    first = [u % 20 for u in removed[:20]]
    assert len(set(first)) == 20
    assert damage[19] < 1e-7 < damage[20]


def test_twins_are_not_picked_together():
    rng = torch.Generator().manual_seed(3)
    rows = torch.randn(400, 32, generator=rng, dtype=torch.float64)
    rows = torch.cat([rows, rows + 1e-7 * torch.randn(400, 32, generator=rng, dtype=torch.float64)], 1)
    weight = torch.randn(64, 6, generator=rng, dtype=torch.float64)
    s = System(rows.T @ rows, weight, float((rows @ weight).square().sum()), torch.arange(64)[:, None])
    order = Selection([s]).order(lambda now: now.changes().nan_to_num(-1), rounds=8)  # eight at a time
    assert sorted(order) == list(range(64))
    assert len({unit % 32 for unit in order[:32]}) == 32


def test_rounds_of_several_units_report_the_damage_of_all_that_went():
    rows, s = system(6, units=12, block=2)
    removed, damage = Elimination([s], ridge=0.0).order(rounds=4)
    assert len(removed) == len(damage) == 11
    assert damage == sorted(damage)
    assert damage[-1] == pytest.approx(brute_force(rows, s, removed)[0], rel=1e-8)


def test_inverses_are_as_good_after_many_drops_from_a_nearly_singular_matrix():
    """Ninety columns, thirty of them repeated up to a hair."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 90, generator=generator, dtype=torch.float64)
    rows[:, 60:] = rows[:, :30] + 1e-7 * rows[:, 60:]
    weight = torch.randn(90, 4, generator=generator, dtype=torch.float64)
    energy = float((rows @ weight).square().sum())
    kernel = Elimination([System(rows.T @ rows, weight, energy, torch.arange(90)[:, None])], ridge=0.0)
    for unit in range(60, 90):
        kernel.drop([unit])
    fresh = torch.linalg.inv(rows[:, :60].T @ rows[:, :60])
    torch.testing.assert_close(kernel.inverses[0][:60, :60], fresh, rtol=1e-8, atol=1e-12)
    for unit in (3, 50, 17):
        kernel.drop([unit])
    stays = [c for c in range(60) if c not in (3, 50, 17)]
    a, target = rows[:, stays].numpy(), (rows @ weight).numpy()
    left = target - a @ np.linalg.lstsq(a, target, rcond=None)[0]
    assert kernel.damage == pytest.approx(np.square(left).sum() / energy, rel=1e-7)
