"""The elimination kernel and the ridge refits against brute-force refits in float64."""

import numpy as np
import pytest
import torch

from edgeprune.prune.gram import Elimination, System, gram, ridge_step, solve_ridge


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
