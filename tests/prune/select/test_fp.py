"""FP-OMP and FP-Backward against brute-force refits of the filters themselves."""

import itertools

import numpy as np
import pytest
import torch
from nets import images
from torch import nn
from torch.nn import functional as F

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.prune.consumers import find_consumers
from edgeprune.prune.gram import Elimination
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program
from edgeprune.prune.select.fp import (
    backward,
    curve_of,
    fp_backward,
    fp_backward_out,
    fp_omp,
    fp_omp_out,
    input_gram,
    output_gram,
    pursuit,
    system,
)


def filters(seed, n=8, d=20):
    """Correlated filters as the columns of (d, n)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d, n)) @ (np.eye(n) + 0.4 * rng.normal(size=(n, n)))


def gram_of(f):
    return torch.from_numpy(f.T @ f)


def error(f, kept):
    """Squared error of the best combinations of the kept filters, and the combinations (kept, n), by numpy."""
    solution = np.linalg.lstsq(f[:, kept], f, rcond=None)[0]
    return np.square(f - f[:, kept] @ solution).sum(), solution


@pytest.mark.parametrize("seed", range(4))
def test_every_step_of_backward_elimination_equals_refits(seed):
    f = filters(seed)
    kernel = Elimination([system(gram_of(f))], ridge=0.0)
    energy, left = np.square(f).sum(), list(range(8))
    while len(left) > 1:
        before = error(f, left)[0]
        refits = [error(f, [c for c in left if c != k])[0] - before for k in left]
        increases = kernel.increases()[left] * energy
        np.testing.assert_allclose(increases, refits, rtol=1e-8, atol=1e-10 * energy)
        unit = left[int(np.argmin(refits))]
        assert int(kernel.increases().argmin()) == unit
        kernel.drop([unit])
        left.remove(unit)
        np.testing.assert_allclose(
            kernel.inverses[0][left][:, left], np.linalg.inv(f[:, left].T @ f[:, left]), rtol=1e-8
        )
        np.testing.assert_allclose(kernel.weights[0][left], error(f, left)[1], rtol=1e-8, atol=1e-9)


def test_the_first_increase_is_the_distance_from_the_others():
    f = filters(0)
    increases = Elimination([system(gram_of(f))], ridge=0.0).increases() * np.square(f).sum()
    for k in range(8):
        others = [c for c in range(8) if c != k]
        own = np.linalg.lstsq(f[:, others], f[:, k], rcond=None)[0]
        distance = np.square(f[:, k] - f[:, others] @ own).sum()
        assert float(increases[k]) == pytest.approx(distance, rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_pursuit_on_the_gram_matrix_is_pursuit_on_filters(seed):
    f = filters(seed)
    picked, r = [], f
    for _ in range(7):
        scores = np.abs(r.T @ f).sum(0)
        scores[picked] = -1
        picked.append(int(scores.argmax()))
        r = f - f[:, picked] @ error(f, picked)[1]
    assert pursuit(gram_of(f))[:7] == picked


@pytest.mark.parametrize("choose", [backward, pursuit])
def test_curves_are_refits(choose):
    for seed in range(4):
        f = filters(seed)
        curve = curve_of(gram_of(f), choose)
        assert curve.cost[8] == 0
        assert curve.cost[0] == pytest.approx(1)
        for width in range(1, 8):
            expected = error(f, curve.order[:width].tolist())[0] / np.square(f).sum()
            assert curve.cost[width] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("choose", "bound"), [(backward, 1.3), (pursuit, 1.6)])
def test_near_the_best_subset_and_never_better(choose, bound):
    for seed in range(12):
        f = filters(seed)
        best = min(error(f, list(kept))[0] for kept in itertools.combinations(range(8), 4))
        found = curve_of(gram_of(f), choose).cost[4] * np.square(f).sum()
        assert best * (1 - 1e-9) <= found <= bound * best


@pytest.mark.parametrize("choose", [backward, pursuit])
def test_more_filters_than_dimensions(choose):
    f = filters(3, n=30, d=9)
    curve = curve_of(gram_of(f), choose)
    assert sorted(curve.order.tolist()) == list(range(30))
    assert np.isfinite(curve.cost).all()
    assert curve.cost[9] < 1e-10
    assert np.linalg.matrix_rank(f[:, curve.order[:9]]) == 9
    assert curve.cost[8] > 1e-4
    expected = error(f, curve.order[:5].tolist())[0] / np.square(f).sum()
    assert curve.cost[5] == pytest.approx(expected, rel=1e-8)


def planted():
    """A convolution of 10 filters, three of them combinations of the others."""
    torch.manual_seed(0)
    leaf = nn.Conv2d(4, 10, 3, padding=1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        w = leaf.weight
        w[3], w[5], w[8] = w[0] - 2 * w[1], 0.5 * w[2] + w[9], w[0] + w[4] + w[6]
    return leaf


def test_planted_combinations_are_dropped_for_nothing_and_the_wrapped_layer_gives_the_same():
    leaf = planted()
    f = leaf.weight.detach().flatten(1).T.numpy()
    order = backward(gram_of(f))
    assert curve_of(gram_of(f), backward).cost[7] < 1e-10
    assert curve_of(gram_of(f), backward).cost[6] > 1e-3
    kept = order[:7]
    assert np.linalg.matrix_rank(f[:, kept]) == 7
    kernel = Elimination([system(gram_of(f))], 1e-10)
    kernel.drop(order[7:])
    combine = kernel.weights[0][kept].T[:, :, None, None]  # the 1x1 behind the thinner layer
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        wrapped = F.conv2d(F.conv2d(x, leaf.weight[kept], padding=1), combine)
        torch.testing.assert_close(wrapped, leaf(x), rtol=1e-5, atol=1e-5)


def test_planted_slices_are_replaced_on_the_input_side_too():
    torch.manual_seed(0)
    leaf = nn.Conv2d(6, 5, 3, padding=1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        leaf.weight[:, 4] = leaf.weight[:, 0] - 3 * leaf.weight[:, 2]
    f = leaf.weight.detach().transpose(0, 1).flatten(1).T.numpy()
    order = backward(gram_of(f))
    assert order[-1] in (0, 2, 4)
    kept = sorted(order[:5])
    kernel = Elimination([system(gram_of(f))], 1e-10)
    kernel.drop(order[5:])
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    with torch.no_grad():
        mixed = F.conv2d(x, kernel.weights[0][kept][:, :, None, None])  # the 1x1 in front of the thinner layer
        torch.testing.assert_close(F.conv2d(mixed, leaf.weight[:, kept], padding=1), leaf(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
def test_the_predicted_error_is_the_measured_one(side):
    torch.manual_seed(1)
    weight = torch.randn(7, 6, 3, 3, dtype=torch.float64)
    long = weight.flatten(1) if side == "output" else weight.transpose(0, 1).flatten(1)
    kernel = Elimination([system(long @ long.T)], ridge=0.0)
    kernel.drop([2, 4])
    combine = kernel.weights[0].T  # rebuilt filter j = sum over kept
    measured = (long - combine @ long).square().sum() / long.square().sum()
    assert kernel.damage == pytest.approx(float(measured), rel=1e-8)
    assert float(combine[:, [2, 4]].abs().max()) == 0


def test_the_order_in_which_filters_went_does_not_matter():
    g = gram_of(filters(5))
    kernels = []
    for dropped in ([1, 6, 3], [3, 1, 6], [6, 3, 1]):
        kernel = Elimination([system(g)], ridge=0.0)
        for unit in dropped:
            kernel.drop([unit])
        kernels.append(kernel)
    for kernel in kernels[1:]:
        torch.testing.assert_close(kernel.weights[0], kernels[0].weights[0], rtol=1e-9, atol=1e-10)
        assert kernel.damage == pytest.approx(kernels[0].damage, rel=1e-9)


class Residual(nn.Module):
    """Two layers make the group "a": the second behind its batch norm; a depthwise layer stands before the reader."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Conv2d(6, 4, 8)
        nn.init.uniform_(self.norm.weight, 0.2, 3)
        nn.init.uniform_(self.norm.running_var, 0.2, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(x + self.norm(self.b(x)))
        return self.head(torch.relu(self.deep(x)))


def test_all_makers_count_with_their_norms_and_depthwise_layers():
    torch.manual_seed(0)
    module = Residual().eval()
    network = lift(module, [(1, 3, 8, 8)])
    group = analyse(network).group("a")
    scale = (module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()).double()
    a = module.a.weight.detach().double().flatten(1)
    b = module.b.weight.detach().double().flatten(1) * scale.detach()[:, None]
    long = torch.cat([a / a.norm(), b / b.norm()], 1)
    deep = module.deep.weight.detach().double().flatten(1)
    outer = torch.einsum("ui,uj->uij", long, deep).flatten(1)
    expected = outer @ outer.T
    found = output_gram(Program(network), group)
    torch.testing.assert_close(found / found.trace(), expected / expected.trace(), rtol=1e-5, atol=1e-7)


def test_readers_slices_are_stacked():
    torch.manual_seed(0)
    module = Residual().eval()
    network = lift(module, [(1, 3, 8, 8)])
    consumers = find_consumers(None, Program(network), analyse(network).group("a"))
    slices = []
    for path in ("b", "head"):
        long = getattr(module, path).weight.detach().double().transpose(0, 1).flatten(1)
        slices.append(long / long.norm())
    long = torch.cat(slices, 1)
    torch.testing.assert_close(input_gram(consumers), long @ long.T, rtol=1e-6, atol=1e-9)


class Boxes(nn.Module):
    """Units of several channels: a grouped layer's offsets go together."""

    def __init__(self, transposed):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.make = kind(8, 12, 3, padding=1, groups=1 if transposed else 2)
        self.read = nn.Conv2d(12, 4, 3, padding=1, groups=1 if transposed else 2)
        self.head = nn.Conv2d(4, 2, 8)

    def forward(self, x):
        return self.head(torch.relu(self.read(torch.relu(self.make(self.stem(x))))))


@pytest.mark.parametrize("transposed", [True, False])
def test_units_of_grouped_and_transposed_layers(transposed):
    torch.manual_seed(0)
    module = Boxes(transposed).eval()
    network = lift(module, [(1, 3, 8, 8)])
    group = analyse(network).group("make")
    assert group.size == (12 if transposed else 6)
    weight = module.make.weight.detach().double()
    long = (weight.transpose(0, 1) if transposed else weight.reshape(2, 6, -1).transpose(0, 1)).flatten(1)
    expected = long @ long.T
    torch.testing.assert_close(output_gram(Program(network), group), expected / expected.trace(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("selector", [fp_backward_out, fp_omp_out])
def test_a_combination_of_other_filters_goes_first(selector):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 6)).eval()
    with torch.no_grad():
        module[1].weight.uniform_(0.5, 2)
        w = module[0].weight / 3  # as batch norm leaves them, filter 5 is half of 1 and half of 6
        own = module[1].weight[:, None, None, None]
        w[5] = 0.5 * (own[1] * w[1] + own[6] * w[6]) / own[5]
        module[0].weight.copy_(w)
    network = lift(module, [(1, 3, 8, 8)])
    judge = Judge(network, network, [images(8)])
    group = analyse(network).group("0")
    curve = selector(judge, [group])(group, find_consumers(judge, judge.program, group))
    assert curve.order[-1] in (1, 5, 6)
    assert curve.cost[7] < 1e-6 < curve.cost[6]


@pytest.mark.parametrize("selector", [fp_backward, fp_omp])
def test_data_does_not_matter(selector):
    torch.manual_seed(0)
    network = lift(Residual().eval(), [(1, 3, 8, 8)])
    orders = []
    for seed in (1, 2):
        judge = Judge(network, network, [images(16, seed)])
        group = analyse(network).group("a")
        orders.append(selector(judge, [group])(group, find_consumers(judge, judge.program, group)).order.tolist())
    assert orders[0] == orders[1]
