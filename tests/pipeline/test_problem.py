"""The law that joins the three views: what the planner adds up for a plan is what the kernels of the network cut by
that plan add up to."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.deploy.export import to_onnx
from edgeprune.graph.count import count
from edgeprune.graph.fold import fold
from edgeprune.graph.lift import lift
from edgeprune.graph.resconv import factors, instrument
from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import multiply_adds
from edgeprune.pipeline.apply import apply_plan
from edgeprune.pipeline.problem import attainable, build_problem, group_candidates, needed_kernels
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.exact import evaluate, smallest, solve
from edgeprune.plan.problem import Axis, Plan, Ranking


class Basic(nn.Module):
    def __init__(self, c_in, c_out, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, inner, 3, stride=1 if c_in == c_out else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.pad = (c_out - c_in) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(x + y)


class Padded(nn.Module):
    """Residual stages joined by parameter-free shortcuts: the trunk's width is a sum of groups."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(Basic(4, 4, 6), Basic(4, 8, 8), Basic(8, 8, 5))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.stem(x))).mean((2, 3)))


class Mixed(nn.Module):
    """Depthwise, squeeze-excite, concatenation, flatten to a linear."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.dw = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.b = nn.Conv2d(6, 5, 1)
        self.c = nn.Conv2d(11, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = torch.relu(self.dw(torch.relu(self.a(x))))
        x = x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        y = torch.cat([x, torch.relu(self.b(x))], 1)
        return self.head(torch.relu(self.c(y)).flatten(1))


def price(kernel):
    """Deterministic, different for every kernel, and growing with its size. Layout marks are a matter of measuring:
    they are the full network's in a plan and the cut network's afterwards."""
    shapes = (*kernel.inputs, kernel.output)
    size = sum(math.prod(s) for s in shapes) + math.prod(kernel.inputs[0][1:2] + kernel.output[1:2])
    return 1e-4 * size + 1e-6 * (zlib.crc32(kernel.with_attrs(io="").key().encode()) % 97)


class Plain(nn.Sequential):
    """No residual branch: every block is a layer with a shortcut that it was given."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(24, 3),
        )  # fmt: skip


def with_shortcuts(network):
    new = instrument(network)
    for factor in factors(new):
        nn.init.constant_(new.module.get_parameter(factor.m), 0.6)
    return new


@pytest.fixture(scope="module", params=[Padded, Mixed, Plain], ids=["padded", "mixed", "plain"])
def anatomy(request):
    torch.manual_seed(0)
    size = 8 if request.param is Padded else 4
    network = lift(request.param().eval(), [(1, 3, size, size)])
    return dissect(with_shortcuts(network) if request.param is Plain else network)


def problem_of(anatomy, budget_ms, seed=0):
    rng = np.random.default_rng(seed)
    groups = anatomy.channels.groups
    rankings = {
        g.name: Ranking(rng.permutation(g.size), np.append(np.sort(rng.random(g.size))[::-1], 0.0)) for g in groups
    }
    candidates = [tuple(range(1, g.size + 1)) for g in groups]
    damage = {b.name: float(rng.random()) for b in anatomy.blocks}
    return build_problem(anatomy, candidates, price, 0.01, rankings, damage, budget_ms), rankings


def kernels_ms(network):
    return 0.01 + sum(price(span.site.kernel) for span in dissect(network).spans)


@pytest.mark.parametrize("seed", range(5))
def test_planned_latency_is_that_of_the_cut_network(anatomy, seed):
    problem, rankings = problem_of(anatomy, 1e9)
    rng = np.random.default_rng(seed)
    widths = {g.name: int(rng.integers(1, g.size + 1)) for g in anatomy.channels.groups}
    planned, _ = evaluate(problem, widths)
    keep = {name: rankings[name].keep(width) for name, width in widths.items()}
    cut = apply_plan(anatomy.network, Plan(widths, keep=keep))
    concats = any(span.proportional for span in anatomy.spans)
    assert planned == pytest.approx(kernels_ms(cut), rel=0.05 if concats else 1e-9)


def macs_only(problem):
    return replace(problem, terms=tuple(replace(term, latency_ms=term.macs) for term in problem.terms))


@pytest.mark.parametrize("seed", range(5))
def test_planned_multiply_adds_are_those_of_the_cut_network(anatomy, seed):
    """Counted on the graph of the cut network, which knows nothing of kernels."""
    problem, rankings = problem_of(anatomy, 1e9)
    rng = np.random.default_rng(seed)
    widths = {g.name: int(rng.integers(1, g.size + 1)) for g in anatomy.channels.groups}
    planned, _ = evaluate(macs_only(problem), widths)
    keep = {name: rankings[name].keep(width) for name, width in widths.items()}
    assert planned == count(fold(apply_plan(anatomy.network, Plan(widths, keep=keep)))).macs
    assert evaluate(macs_only(problem), {})[0] == count(anatomy.folded).macs


class Products(nn.Module):
    """All that multiplies: transposed, grouped, dilated and one-dimensional convolutions, linears, matrix products."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2)
        self.each = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4)
        self.wide = nn.Conv2d(4, 8, (1, 3), dilation=2, groups=2)
        self.line = nn.Conv1d(8, 6, 3)
        self.mix, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = self.line(self.wide(self.each(self.up(x))).flatten(2)[:, :, :40]).transpose(1, 2)
        x = self.mix(torch.softmax(x @ x.transpose(1, 2), 2) @ x)
        return self.head(x.mean(1))


def test_multiply_adds_of_all_kernels_are_those_of_the_network():
    network = fold(lift(Products().eval(), [(1, 6, 5, 7)]))
    kernels = [site.kernel for site in sites(to_onnx(network))]
    assert sum(map(multiply_adds, kernels)) == count(network).macs
    assert {"Conv", "ConvTranspose", "Gemm", "MatMul"} <= {k.op for k in kernels if multiply_adds(k)}


def test_removing_a_block_takes_its_kernels_away(anatomy):
    problem, _ = problem_of(anatomy, 1e9)
    for block in anatomy.blocks:
        planned, _ = evaluate(problem, {}, [block.name])
        removed = apply_plan(anatomy.network, Plan({}, removed=(block.name,)))
        assert planned == pytest.approx(kernels_ms(removed), rel=1e-9)


def test_a_plan_stays_within_its_budget(anatomy):
    full = kernels_ms(anatomy.network)
    floor = smallest(problem_of(anatomy, 0.0)[0])
    assert floor < 0.6 * full
    problem, rankings = problem_of(anatomy, 0.6 * full)
    plan = solve(problem)
    keep = {name: rankings[name].keep(width) for name, width in plan.widths.items()}
    cut = apply_plan(anatomy.network, Plan(plan.widths, removed=plan.removed, keep=keep))
    assert kernels_ms(cut) <= 0.6 * full * (1.02 if any(s.proportional for s in anatomy.spans) else 1 + 1e-9)


def test_every_kernel_of_a_plan_is_among_the_needed_ones(anatomy):
    candidates = [tuple(range(1, g.size + 1)) for g in anatomy.channels.groups]
    needed = needed_kernels(anatomy, candidates)
    for span in anatomy.spans:
        assert span.at(span.full).key() in needed
        assert span.at(span.full) == span.site.kernel


def test_candidates_are_the_right_edges_of_the_stairs(anatomy):
    def stairs(kernel):  # steps of two channels, and a third one that is slower than the whole
        counts = [s[1] for s in (*kernel.inputs, kernel.output) if len(s) > 1]
        return math.prod(2 * math.ceil(c / 2) for c in counts) * (3.0 if 3 in counts else 1.0)

    for group, widths in zip(anatomy.channels.groups, group_candidates(anatomy, stairs), strict=True):
        unit = max(s.index.shape[1] for s in group.slots)
        assert widths[-1] == group.size
        assert set(widths) != set(range(1, group.size + 1)) or group.size == 1
        if all(len(s.index[0]) == 1 for s in group.slots) and group.name.endswith("conv1"):
            assert set(widths) == {w for w in range(1, group.size + 1) if w % 2 == 0} | {group.size}, unit


def test_widths_of_unknown_price_are_no_candidates(anatomy):
    full = {span.at(span.full).key() for span in anatomy.spans}
    candidates = group_candidates(anatomy, lambda kernel: 1.0 if kernel.key() in full else None)
    assert list(candidates) == [(group.size,) for group in anatomy.channels.groups]


def test_attainable_sums():
    axis = Axis(((0, 2), (1, 1)), const=3)
    assert attainable(axis, [(1, 4), (5, 6)]) == (10, 11, 16, 17)
