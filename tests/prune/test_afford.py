import math

import pytest
import torch
from nets import small
from torch import nn

from edgeprune.graph.lift import lift
from edgeprune.prune.afford import frontiers, live_after, multiply_adds, peak_bytes, sizes_of
from edgeprune.prune.program import Program


def test_multiply_adds_of_a_layer():
    program = Program(lift(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, groups=1), nn.ReLU()), [(1, 3, 9, 9)]))
    costs = dict(zip((n.name for n in program.nodes), multiply_adds(program, sizes_of(program)), strict=True))
    assert costs["conv2d"] == 8 * 4 * 4 * 27
    assert costs["relu"] == 8 * 4 * 4


def test_peak_is_the_shortcut_and_the_branch():
    program = Program(small())
    assert peak_bytes(program, sizes_of(program)) == 4 * 8 * 8 * (8 + 12 + 0)  # stream and hidden


def test_frontiers_cut_the_graph():
    """With the kept values before a node known, nothing before them is needed."""

    class Skips(nn.Module):  # as in a U-Net: long-lived values
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            a = self.a(x).relu()
            b = self.b(torch.nn.functional.max_pool2d(a, 2)).relu()
            return self.c(torch.nn.functional.interpolate(b, scale_factor=2) + a)

    for network in (lift(Skips(), [(1, 4, 8, 8)]), small()):
        program = Program(network)
        sizes = sizes_of(program)
        kept = frontiers(program, sizes)
        assert kept
        full = sum(multiply_adds(program, sizes))
        tail = {n.name for n in program.needed([program.output.name], kept)}
        cost = sum(c for n, c in zip(program.nodes, multiply_adds(program, sizes), strict=True) if n.name in tail)
        assert cost < 0.5 * full
        for i, node in enumerate(program.nodes):
            assert all(program.order[name] <= i for name in live_after(program, sizes)[i]), node


def test_images_are_bounded_by_memory_and_work(monkeypatch):
    from edgeprune.prune import compensate, judge

    network = small()
    x = torch.randn(100, 3, 8, 8)
    whole = judge.Judge(network, network, [x])
    assert [sum(len(b[0]) for b in half) for half in (whole.fitting, whole.batches)] == [50, 50]
    monkeypatch.setattr(judge, "CHECKPOINT_BYTES", 1)
    small_one = judge.Judge(network, network, [x])
    assert sum(len(b[0]) for half in (small_one.fitting, small_one.batches) for b in half) == judge.MIN_IMAGES
    assert compensate._affordable(network, 50) == 50
    monkeypatch.setattr(compensate, "ACTIVATION_BYTES", 4 * 8 * 8 * 20 * 30)
    assert compensate._affordable(network, 50) == pytest.approx(30)
    assert math.isfinite(compensate._affordable(network, None))
