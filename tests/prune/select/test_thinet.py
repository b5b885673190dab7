"""ThiNet's selections and curves against the plain sums and least-squares fits they stand for."""

import itertools

import numpy as np
import pytest
import torch
from nets import images
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import cut
from edgeprune.prune.compensate import compensate
from edgeprune.prune.consumers import find_consumers, in_parts
from edgeprune.prune.judge import Judge
from edgeprune.prune.patches import output_places, rows_at
from edgeprune.prune.select.thinet import (
    contribution_gram,
    contributions,
    curve_of,
    greedy,
    pursuit,
    thinet,
    thinet_omp,
)


def samples(seed, n=300, units=9):
    """Correlated contributions (n, units) of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, units)) @ rng.normal(size=(units, units)) * rng.uniform(0.2, 2, units)
    return x, torch.from_numpy(x.T @ x)


def residual(x, kept):
    """Squared residual of y, each kept unit scaled as is best, by numpy."""
    y = x.sum(1)
    w = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    return np.square(y - x[:, kept] @ w).sum()


@pytest.mark.parametrize("seed", range(4))
def test_greedy_on_the_gram_matrix_is_greedy_on_samples(seed):
    x, g = samples(seed)
    dropped, left = [], list(range(9))
    while left:
        unit = min(left, key=lambda c: np.square(x[:, [*dropped, c]].sum(1)).sum())
        dropped.append(unit)
        left.remove(unit)
    assert greedy(g) == dropped[::-1]


def test_the_first_one_dropped_is_the_best_single_one():
    for seed in range(10):
        x, g = samples(seed)
        single = [np.square(x.sum(1) - np.delete(x, c, 1).sum(1)).sum() for c in range(9)]
        assert greedy(g)[-1] == int(np.argmin(single))


def test_what_is_dropped_is_what_is_missing():
    x, g = samples(0)
    order = greedy(g)
    kept, dropped = order[:5], order[5:]
    missing = np.square(x.sum(1) - x[:, kept].sum(1)).sum()
    ones = torch.zeros(9, dtype=torch.float64)
    ones[dropped] = 1
    assert float(ones @ g @ ones) == pytest.approx(missing, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_pursuit_on_the_gram_matrix_is_pursuit_on_samples(seed):
    x, g = samples(seed)
    y, picked = x.sum(1), []
    for _ in range(9):
        r = y if not picked else y - x[:, picked] @ np.linalg.lstsq(x[:, picked], y, rcond=None)[0]
        left = [c for c in range(9) if c not in picked]
        picked.append(min(left, key=lambda c: np.linalg.norm(r - (x[:, c] @ r / np.square(x[:, c]).sum()) * x[:, c])))
        if len(picked) == 8:
            break
    assert pursuit(g)[:8] == picked


@pytest.mark.parametrize("choose", [greedy, pursuit])
def test_curves_are_what_least_squares_scales_leave(choose):
    for seed in range(5):
        x, g = samples(seed)
        curve = curve_of(g, choose(g))
        y = x.sum(1)
        assert curve.cost[0] == pytest.approx(1, rel=1e-8)
        assert curve.cost[9] == 0
        for width in range(1, 9):
            kept = curve.order[:width].tolist()
            assert curve.cost[width] == pytest.approx(residual(x, kept) / np.square(y).sum(), rel=1e-8)
            unscaled = np.square(y - x[:, kept].sum(1)).sum()
            assert curve.cost[width] * np.square(y).sum() <= unscaled * (1 + 1e-8)


def test_greedy_and_pursuit_are_never_better_than_the_best_subset():
    for seed in range(5):
        x, g = samples(seed, units=7)
        best = min(residual(x, list(kept)) for kept in itertools.combinations(range(7), 4))
        for choose in (greedy, pursuit):
            assert curve_of(g, choose(g)).cost[4] * np.square(x.sum(1)).sum() >= best * (1 - 1e-9)


def test_a_twin_is_dropped_for_nothing():
    x, _ = samples(1)
    x[:, 6] = x[:, 2]
    g = torch.from_numpy(x.T @ x)
    order = pursuit(g)
    assert order[-1] in (2, 6)
    curve = curve_of(g, order)
    assert curve.cost[8] < 1e-9 < curve.cost[7]


def test_of_twins_in_a_network_one_goes_and_the_other_is_read_twice_as_loud():
    """The factor of 2 that ThiNet would give the twin comes from the refit of the reader's whole weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(180, 3))
    with torch.no_grad():
        for parameter in (module[0].weight, module[0].bias, module[2].weight.transpose(0, 1)):
            parameter[4] = parameter[1]
    network = lift(module.eval(), [(1, 3, 8, 8)])
    channels = analyse(network)
    judge = Judge(network, network, [images(64)])
    curve = thinet_omp(judge, [])(channels.group("0"), find_consumers(judge, judge.program, channels.group("0")))
    kept = sorted(curve.order[:5].tolist())
    assert curve.order[5] in (1, 4)
    assert curve.cost[5] < 1e-9 < curve.cost[4]
    repaired = compensate(network, cut(network, channels, {"0": kept}), [images(64)])
    factors = torch.tensor([2.0 if unit in (1, 4) else 1.0 for unit in kept])[:, None, None]
    expected = module[2].weight[:, kept] * factors
    torch.testing.assert_close(repaired.module.get_submodule("2").weight, expected, rtol=1e-3, atol=1e-4)


def test_dependent_and_dead_units_give_no_nonsense():
    x, _ = samples(2, n=4)  # nine units, four samples
    x[:, 3] = 0
    g = torch.from_numpy(x.T @ x)
    for choose in (greedy, pursuit):
        curve = curve_of(g, choose(g))
        assert sorted(curve.order.tolist()) == list(range(9))
        assert np.isfinite(curve.cost).all()
        assert (np.diff(curve.cost) <= 0).all()
    assert greedy(torch.zeros(3, 3, dtype=torch.float64)) is not None
    assert np.isfinite(curve_of(torch.zeros(3, 3, dtype=torch.float64), [0, 1, 2]).cost).all()


READERS = {
    "padded": nn.Conv2d(6, 4, 3, padding=1),
    "strided": nn.Conv2d(6, 4, 3, 2, padding=(1, 0), bias=False),
    "reflecting": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "dilated": nn.Conv2d(6, 4, (3, 2), padding=2, dilation=2),
    "grouped": nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "pointwise": nn.Conv2d(6, 4, 1),
}


@pytest.mark.parametrize("kind", READERS)
def test_contributions_add_up_to_the_layers_real_output(kind):
    torch.manual_seed(0)
    leaf = READERS[kind]
    network = lift(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), leaf, nn.Flatten(), nn.LazyLinear(2)), [(2, 3, 9, 9)])
    judge = Judge(network, network, [images(8, size=9)])
    consumers = find_consumers(judge, judge.program, analyse(network).group("0"))
    assert len(consumers) == (2 if kind == "grouped" else 1)
    (source,) = consumers[0].sources
    x = judge.values([source])[source]
    where = judge.reference.where(output_places(leaf, x[0]), 40)
    with torch.no_grad():
        real = leaf(x[0]).movedim(1, -1)[where].double()
    bias = leaf.bias.detach().double() if leaf.bias is not None else torch.zeros(4, dtype=torch.float64)
    for c in consumers:
        own = slice(c.part * c.packed.shape[1], (c.part + 1) * c.packed.shape[1])
        outputs = torch.stack(
            [torch.arange(len(real)) % c.packed.shape[1], torch.zeros(len(real), dtype=torch.int64)], 1
        )
        found = contributions(in_parts(rows_at(leaf, x, where))[c.part], c, outputs).sum(2)
        torch.testing.assert_close(found, (real - bias)[:, own].gather(1, outputs), rtol=1e-5, atol=1e-5)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.make(x))
        return self.head(torch.relu(self.a(x) + 100 * self.b(x)).mean((2, 3)))


def test_readers_are_stacked_with_equal_energy():
    torch.manual_seed(0)
    network = lift(TwoReaders(), [(1, 3, 9, 9)])
    judge = Judge(network, network, [images(32, size=9)])
    a, b = find_consumers(judge, judge.program, analyse(network).group("make"))
    both = contribution_gram(judge, [a, b])
    assert float(both.sum()) == pytest.approx(2, rel=1e-9)
    assert float(contribution_gram(judge, [a]).sum()) == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(both - contribution_gram(judge, [a]), contribution_gram(judge, [b]), rtol=0.1, atol=0.02)
    assert torch.linalg.eigvalsh(both).min() > -1e-9


@pytest.mark.parametrize("selector", [thinet, thinet_omp])
def test_dropping_what_nobody_hears_changes_nothing(selector):
    """Dead units gone, weights as they were: the cut layer's outputs are the old ones."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1), nn.ReLU(),
                           nn.Conv2d(5, 2, 8))  # fmt: skip
    with torch.no_grad():
        module[2].weight[:, [1, 6]] = 0
    network = lift(module, [(1, 3, 8, 8)])
    channels = analyse(network)
    group = channels.group("0")
    judge = Judge(network, network, [images(32)])
    consumers = find_consumers(judge, judge.program, group)
    curve = selector(judge, [group])(group, consumers)
    kept = sorted(curve.order[:6].tolist())
    assert kept == [0, 2, 3, 4, 5, 7]
    assert curve.cost[6] < 1e-9 < curve.cost[5]
    smaller = cut(network, channels, {"0": kept})
    x = images(4)
    with torch.no_grad():
        torch.testing.assert_close(smaller.module(x), network.module(x), rtol=1e-5, atol=1e-6)
