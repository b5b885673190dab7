"""Depth, width and resolution weighed together, with prices and a clock that are made up."""

import types

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.graph.lift import lift
from edgeprune.graph.resolution import at_resolution
from edgeprune.pipeline import workdir
from edgeprune.pipeline.apply import State, advance
from edgeprune.pipeline.grid import Axes, price
from edgeprune.pipeline.scaling import choose, score_images
from edgeprune.pipeline.shrink import Judgement, predicted_ms, problem_of
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.problem import Ranking
from edgeprune.plan.scaling import AXES, fit_accuracy
from edgeprune.train.dataset import DataSet

SLOWER = 1.1  # than the table says is every network below its own size


class Sizes:
    """Milliseconds of a kernel: its elements."""

    fusion = None

    def prepare(self, anatomy):
        return [tuple(sorted({*range(2, g.size, 2), g.size})) for g in anatomy.channels.groups]

    def stand_in(self, anatomy, kernels):
        self.asked = [kernel.key() for kernel in kernels]

    def kernel_ms(self, kernel):
        return float(np.prod(kernel.output) + sum(map(np.prod, kernel.inputs))) * 1e-4

    def constant_ms(self):
        return 0.01


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.a(x))))


class Net(nn.Module):
    """``fine``: its classes depend on the differences of neighbouring pixels, else on colours."""

    def __init__(self, fine):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 12, 2 if fine else 4, 2 if fine else 4)
        if fine:
            with torch.no_grad():
                self.stem.weight.copy_(torch.randn(12, 3, 1, 1) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        self.blocks = nn.Sequential(*(Block(12) for _ in range(4)))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def pictures(fine, count=240):
    generator = torch.Generator().manual_seed(1)
    colour = torch.randn(count, 3, 1, 1, generator=generator).expand(count, 3, 32, 32).contiguous()
    return colour * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16) if fine else colour


def judge():
    def judged(state, anatomy, candidates):
        rankings = {g.name: Ranking(np.arange(g.size), np.linspace(1, 0, g.size + 1)) for g in anatomy.channels.groups}
        return Judgement(rankings, {b.name: 0.5 - 0.1 * i for i, b in enumerate(anatomy.blocks)})

    return types.SimpleNamespace(judge=judged, repair=lambda state: state.network)


def clock(network):
    slow = SLOWER if network.input_shapes[0][2] < 32 else 1.0
    return slow * predicted_ms(dissect(network), Sizes())


def original(fine=False):
    return lift(Net(fine).eval(), [(1, 3, 32, 32)])


def chosen(network, share, fine=False, clock=clock):
    data = DataSet.from_arrays(pictures(fine), name="pictures")
    return choose(network, clock(network), share * clock(network), Sizes(), judge(), clock, data, lambda *_: None)


def axes_of(network):
    anatomy = dissect(network)
    candidates = Sizes().prepare(anatomy)
    judgement = judge().judge(None, anatomy, candidates)
    return Axes(anatomy, judgement, problem_of(anatomy, candidates, Sizes(), judgement)), judgement


def test_the_grid_is_priced_as_the_networks_it_stands_for():
    network = original()
    axes, judgement = axes_of(network)
    widths = axes.narrow([axes.full_ms, 0.7 * axes.full_ms, 0.5 * axes.full_ms])
    assert len(widths) == 3
    grid = axes.combinations(3, widths, [(32, 32), (16, 24)])
    assert len({scale.point for scale in grid}) == len(grid) == 4 * 3 * 2
    for scale, ms in zip(grid, price(axes, grid, Sizes()), strict=True):
        built = advance(State(at_resolution(network, scale.size)), scale.plan, judgement.rankings).network
        assert ms == pytest.approx(predicted_ms(dissect(built), Sizes()), rel=1e-12)


def test_points_are_shares_of_the_original():
    axes, _ = axes_of(original())
    assert axes.scale(0, {}, (32, 32)).point == (1, 1, 1)
    assert axes.scale(1, {}, (16, 16)).point == (0.8, 1, 0.5)  # four blocks and what always stays
    assert axes.scale(0, {}, (8, 32)).point[2] == 0.5
    halves = {g.name: g.widths[-1] // 2 for g in axes.narrowed}
    assert axes.scale(0, halves, (32, 32)).point == (1, 0.5, 1)


def test_blocks_go_in_the_order_of_their_damage():
    axes, judgement = axes_of(original())
    damage = [judgement.block_damage[name] for name in axes.shallow(4).removed]
    assert damage == sorted(damage)
    assert len(damage) == 4


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
def test_the_answer_holds_by_table_and_by_measurement_and_none_on_the_grid_is_better(share):
    network = original()
    budget_ms = share * clock(network)
    scaling = chosen(network, share)
    told = scaling.document["chosen"]
    assert told["predicted_ms"] <= budget_ms
    assert told["measured_ms"] <= budget_ms
    assert tuple(told["input"]) == scaling.size

    samples = scaling.document["samples"]
    points = np.array([[s[name] for name in AXES] for s in samples])
    fitted = fit_accuracy(points, [s["score"] for s in samples])
    axes, _ = axes_of(network)
    sizes = [(round(32 * r), round(32 * r)) for r in sorted({p[2] for p in points}, reverse=True)]
    removed = round((1 - points[:, 0].min()) * (len(axes.blocks) + 1))
    grid = axes.combinations(removed, axes.narrow(np.linspace(axes.full_ms, 0.1 * axes.full_ms, 200)), sizes)
    costs = price(axes, grid, Sizes()) * [SLOWER if s.size[0] < 32 else 1 for s in grid]
    mine = np.array([told[name] for name in AXES])
    assert fitted(mine) == pytest.approx(told["score"])
    on_axis = {p[1] for p in points} | {mine[1]}  # widths that the answer could have had for certain
    for scale, cost in zip(grid, costs, strict=True):
        inside = (np.array(scale.point) >= points.min(0) - 1e-9).all()
        if inside and scale.point[1] in on_axis and cost <= budget_ms:
            assert fitted(scale.point) <= told["score"] + 1e-9, scale.point


def test_samples_lie_along_the_axes_and_as_far_as_each_would_pay_alone():
    network = original()
    scaling = chosen(network, 0.5)
    points = np.array([[s[name] for name in AXES] for s in scaling.document["samples"]])
    assert (points[0] == 1).all()
    assert ((points < 1).sum(1) <= 1).all()
    assert (points < 1).any(0).all()
    smallest = round(32 * points[:, 2].min())
    assert clock(at_resolution(network, (smallest, smallest))) <= 0.5 * clock(network)
    assert clock(at_resolution(network, (smallest + 4, smallest + 4))) > 0.5 * clock(network)


def test_the_clock_overrules_the_table():
    network, calls = original(), []

    def late(cut):  # cut networks take longer than any table tells
        whole = predicted_ms(dissect(network), Sizes())
        now = predicted_ms(dissect(cut), Sizes())
        calls.append(now)
        untouched = any(
            now == predicted_ms(dissect(at_resolution(network, s)), Sizes())
            for s in ((32, 32), (28, 28), (24, 24), (20, 20), (16, 16))
        )
        return now if untouched else now + 0.1 * whole

    told = chosen(network, 0.5, clock=late).document["chosen"]
    assert len(calls) > 1
    assert told["measured_ms"] is not None
    assert told["measured_ms"] <= 0.5 * predicted_ms(dissect(network), Sizes())


def test_what_the_task_does_not_need_goes():
    coarse = chosen(original(fine=False), 0.6)
    assert coarse.size[0] < 32
    fine = chosen(original(fine=True), 0.6, fine=True)
    assert fine.size == (32, 32)


def test_labels_are_scored_by_accuracy_and_others_by_agreement():
    network = original()
    x = pictures(False)
    with torch.no_grad():
        y = network.module(x).argmax(1).numpy()
    y = np.where(np.arange(len(y)) % 10 == 0, (y + 1) % 4, y)  # the original is right on 90 %
    data = DataSet.from_arrays(x, y)
    ms = clock(network)
    told = choose(network, ms, 0.6 * ms, Sizes(), judge(), clock, data, lambda *_: None).document
    assert told["score"] == "accuracy"
    assert told["samples"][0]["score"] == pytest.approx(0.9)
    told = chosen(network, 0.6).document
    assert told["score"] == "agreement"
    assert told["samples"][0]["score"] == 1.0


def test_the_power_law_of_the_report_is_that_of_the_stairs():
    powers = chosen(original(), 0.5).document["latency_powers"]
    assert 1.5 < powers["resolution"] < 2.2  # the made-up time is the number of pixels, and weights
    assert 0 < powers["width"] < 2
    assert 0 < powers["depth"] < 1.5


def test_a_network_that_cannot_change_its_size_is_refused():
    flat = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Flatten(), nn.Linear(8 * 8 * 8, 4))
    with pytest.raises(UnsupportedModelError, match="baked in"):
        chosen(lift(flat.eval(), [(1, 3, 32, 32)]), 0.5)


def test_scores_take_a_bounded_number_of_images():
    network = original()
    assert score_images(network, 90) == 30
    assert score_images(network, 100_000) == 1000
    large = lift(nn.Sequential(nn.Conv2d(3, 512, 7), nn.Conv2d(512, 512, 7)).eval(), [(1, 3, 224, 224)])
    assert score_images(large, 100_000) == 200


def test_a_decision_is_kept_for_the_same_run_only(tmp_path):
    scaling = chosen(original(), 0.5)
    workdir.store_scaling(tmp_path, "key", scaling)
    assert workdir.recall_scaling(tmp_path, "key") == scaling
    assert workdir.recall_scaling(tmp_path, "other") is None
    (tmp_path / workdir.SCALING).write_text("{")
    assert workdir.recall_scaling(tmp_path, "key") is None
