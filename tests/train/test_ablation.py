"""The scoring pass against plain recomputation: every half enumerated, statistics by hand, readers stacked."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.masking import masked_outputs
from edgeprune.train.ablation import Ablation, silence
from edgeprune.train.halving import Search


def plain(width=8, norm=True):
    """conv -> (norm) -> relu -> conv -> (norm) -> relu -> linear over the maps."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    layers += [nn.BatchNorm2d(width)] if norm else []
    layers += [nn.ReLU(), nn.Conv2d(width, 6, 3)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)]
    return lift(nn.Sequential(*layers).eval(), [(1, 3, 8, 8)])


class Branching(nn.Module):
    """A trunk read by a convolution, by a grouped one, and by the head; a depthwise convolution on the way."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.one(self.depthwise(x))
        x = x + torch.relu(self.grouped(x))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def branching():
    torch.manual_seed(0)
    return lift(Branching().eval(), [(1, 3, 8, 8)])


def scored(network, x, train=True):
    """(Ablation that has seen ``x``, channels)."""
    channels = analyse(network)
    ablation = Ablation(network, channels, channels.groups)
    see(network, ablation, x, train)
    return ablation, channels


def see(network, ablation, x, train=True):
    ablation.forget()
    ablation.watching = True
    network.module.train(train)
    with ablation.attached(), torch.no_grad():
        if not train:  # only training passes are noted: frozen norms in a network that trains
            network.module.train()
            for child in network.module.modules():
                if isinstance(child, nn.BatchNorm2d):
                    child.eval()
        network.module(x)
    ablation.watching = False


def halves(size):
    drawn = np.zeros((len(list(itertools.combinations(range(size), size // 2))), size), bool)
    for row, units in zip(drawn, itertools.combinations(range(size), size // 2), strict=True):
        row[list(units)] = True
    return drawn


def one_by_one(ablation, name, drawn):
    return np.array([ablation.damage(name, row[None])[0] for row in drawn])


def test_sampled_damage_converges_to_the_mean_over_all_halves():
    """n = 8, weights and batch fixed: C(8, 4) = 70 halves can be gone through."""
    network = plain()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ablation, _ = scored(network, x)
    drawn = halves(8)
    t = one_by_one(ablation, "0", drawn)
    exact = np.array([t[drawn[:, i]].mean() for i in range(8)])
    assert exact.max() > 1.1 * exact.min()

    search, rng = Search(8, range(1, 9)), np.random.default_rng(0)
    spread, known = [], {row.tobytes(): d for row, d in zip(drawn, t, strict=True)}
    for _ in range(1500):
        sample = search.draw(rng, 1)
        search.charge(sample, np.array([known[sample.tobytes()]]))
        spread.append(np.abs(search.means() - exact).max())
    bound = 4 * t.std() / np.sqrt(search.count.min())
    assert spread[-1] < bound < 0.15 * (exact.max() - exact.min())
    assert spread[-1] < 0.3 * spread[40]


def test_orthogonal_contributions_follow_the_formula():
    """A linear layer whose inputs' contributions are orthogonal, of energies e_i: the expected damage of a set that
    holds i is (e_i + (g - 1) / (n - 1) * (E - e_i)) / E, so units are ordered by their energy."""
    n, images = 8, 16
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False))
    inputs = torch.linalg.qr(torch.randn(images, n, dtype=torch.float64))[0]  # orthonormal columns
    energies = torch.tensor([5.0, 1.0, 3.0, 0.5, 2.0, 8.0, 0.1, 4.0], dtype=torch.float64)
    with torch.no_grad():
        module[0].weight.copy_(torch.diag(energies.sqrt()))
        module[1].weight.copy_(torch.linalg.qr(torch.randn(n, n))[0])
    network = lift(module.eval(), [(1, n)])
    ablation, _ = scored(network, inputs.float())
    drawn = halves(n)
    t = one_by_one(ablation, "0", drawn)
    e, g = energies.numpy(), n // 2
    expected = (e + (g - 1) / (n - 1) * (e.sum() - e)) / e.sum()
    means = np.array([t[drawn[:, i]].mean() for i in range(n)])
    np.testing.assert_allclose(means, expected, rtol=1e-4)
    assert np.argsort(means).tolist() == np.argsort(e).tolist()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.reader, self.after = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        nn.init.uniform_(self.after.weight, 0.5, 2)
        nn.init.uniform_(self.after.running_mean, -1, 1)
        nn.init.uniform_(self.after.running_var, 0.5, 2)

    def forward(self, x):
        return torch.relu(self.after(self.reader(self.relu(self.norm(self.conv(x)))))).mean((2, 3))


@pytest.mark.parametrize("train", [True, False])
def test_the_base_pass_normalises_both(train):
    """With batch statistics those of the base pass, with frozen norms the running ones; and neither is moved."""
    module = Named().eval()
    network = lift(module, [(1, 3, 8, 8)])
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ablation, _ = scored(network, x, train)
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    drawn = np.zeros((1, 8), bool)
    drawn[0, [1, 4, 6]] = True
    found = ablation.damage("conv", drawn)[0]
    for key, value in network.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    with torch.no_grad():
        h = module.norm.train(train)(module.conv(x))
        y = module.reader(F.relu(h))
        cut = F.relu(h).clone()
        cut[:, [1, 4, 6]] = 0
        ablated = module.reader(cut)
        after = module.after
        mean = y.mean((0, 2, 3)) if train else after.running_mean
        var = y.var((0, 2, 3), correction=0) if train else after.running_var
        z, za = (F.relu(F.batch_norm(v, mean, var, after.weight, after.bias, eps=after.eps)) for v in (y, ablated))
        expected = float((z - za).square().sum() / z.square().sum())
        own = F.relu(F.batch_norm(ablated, None, None, after.weight, after.bias, True, eps=after.eps))
        polluted = float((z - own).square().sum() / z.square().sum())
    assert found == pytest.approx(expected, rel=1e-4)
    if train:
        assert abs(polluted - expected) > 0.01 * expected  # what its own statistics would have hidden


def test_a_dead_unit_does_no_damage():
    network = plain()
    with torch.no_grad():
        network.module.get_submodule("3").weight[:, 5] = 0
    ablation, _ = scored(network, torch.randn(4, 3, 8, 8))
    t = one_by_one(ablation, "0", np.eye(8, dtype=bool))
    assert t[5] == 0
    assert (np.delete(t, 5) > 0).all()


def test_parts_share_the_energy_of_the_batch():
    network = plain(norm=False)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ablation, _ = scored(network, x)
    drawn = halves(8)[[3, 40, 66]]
    together = ablation.damage("0", drawn)
    with torch.no_grad():
        first, reader, _ = network.module.children()
        h = F.relu(first(x))
        z = F.relu(reader(h)).double()
        for part, row in enumerate(drawn):
            images = slice(2 * part, 2 * part + 2)
            gone = h[images].clone()
            gone[:, row] = 0
            change = (z[images] - F.relu(reader(gone)).double()).square().sum()
            assert together[part] == pytest.approx(float(3 * change / z.square().sum()), rel=1e-5)


def test_parts_that_are_not_equally_large():
    """Five images in three parts: the mean over the images is still one ratio of sums."""
    network, x = plain(norm=False), torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ablation, _ = scored(network, x)
    row = halves(8)[17]
    parts = ablation.damage("0", np.array([row] * 3))
    assert np.average(parts, weights=[2, 2, 1]) == pytest.approx(ablation.damage("0", row[None])[0], rel=1e-5)


def test_all_readers_of_a_trunk_count_as_one_long_vector():
    network = branching()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ablation, channels = scored(network, x)
    group = channels.groups[0]
    assert {r.path for r in ablation.readers[group.name]} == {"one", "grouped", "head"}
    units = [0, group.size - 1]
    drawn = np.zeros((1, group.size), bool)
    drawn[0, units] = True
    m = network.module
    places = {s.target: s.index[units].ravel() for s in group.slots if s.role == "in"}
    with torch.no_grad():
        stem = torch.relu(m.stem(x))
        inner = m.depthwise(stem)
        trunk = stem + m.one(inner)
        after = trunk + torch.relu(m.grouped(trunk))
        flat = F.adaptive_avg_pool2d(after, 2).flatten(1)
        change = energy = 0.0
        for path, value, act in (
            ("one", inner, lambda v: v),
            ("grouped", trunk, torch.relu),
            ("head", flat, lambda v: v),
        ):
            gone = value.clone()
            gone[:, places[path]] = 0
            z, za = (act(m.get_submodule(path)(v)).double() for v in (value, gone))
            change, energy = change + (z - za).square().sum(), energy + z.square().sum()
    assert ablation.damage(group.name, drawn)[0] == pytest.approx(float(change / energy), rel=1e-5)


@pytest.mark.parametrize("make", [plain, branching])
def test_masks_are_the_cut_networks_function(make):
    """Held at zero where they are read, units are gone for good; the weights can say the same as the masks."""
    network = make().copy()
    channels = analyse(network)
    ablation = Ablation(network, channels, channels.groups)
    alive = {g.name: np.arange(g.size) % 3 != 1 for g in channels.groups}
    x = network.random_inputs(3)
    expected = masked_outputs(network, channels, {n: np.flatnonzero(a).tolist() for n, a in alive.items()}, x)[0]
    whole = network.module(*x)
    assert (whole - expected).abs().max() > 0.01 * whole.abs().max()
    ablation.mask(alive)
    with torch.no_grad(), ablation.attached():
        torch.testing.assert_close(network.module(*x), expected)
        torch.testing.assert_close(copy.deepcopy(network.module)(*x), expected)
        silence(network, channels, alive)
        torch.testing.assert_close(network.module(*x), expected)
    with torch.no_grad():
        torch.testing.assert_close(network.module(*x), expected)
    kept = network.module.get_submodule(next(iter(ablation.widths))).weight
    assert kept.count_nonzero() > 0


def test_a_reader_is_looked_at_through_its_own_mask():
    """What a masked output channel of the next layer would do is nobody's concern."""
    net, x = plain(), torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ablation, channels = scored(net, x)
    second = channels.groups[1]
    alive = {second.name: np.arange(second.size) != 2}
    drawn = halves(8)[:1]
    before = ablation.damage("0", drawn)[0]
    with torch.no_grad():
        net.module.get_submodule("3").weight[2] *= 1000
        net.module.get_submodule("4").weight[2] *= 1000
    see(net, ablation, x)
    loud = ablation.damage("0", drawn)[0]
    ablation.mask(alive)
    see(net, ablation, x)
    masked = ablation.damage("0", drawn)[0]
    with torch.no_grad():
        net.module.get_submodule("3").weight[2] = 0
    see(net, ablation, x)
    assert masked == pytest.approx(ablation.damage("0", drawn)[0], rel=1e-6)
    assert abs(loud - masked) > 0.01 * masked
    assert before != masked


def test_rows_that_are_no_images_are_not_divided():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = torch.relu(self.a(x))
            x = x.view(-1, 8, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8, 4, 4)
            return self.b(x).mean((2, 3))

    network = lift(Windows().eval(), [(1, 3, 8, 8)])
    ablation, channels = scored(network, torch.randn(3, 3, 8, 8))
    if channels.groups:
        assert not ablation.divisible("a", 3)
        assert ablation.damage("a", halves(8)[:1]).shape == (1,)
