"""Test images are for the figures only: what they show decides nothing."""

from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from stand_in_prices import Sizes
from torch import nn

from edgeprune.device.target import find_target
from edgeprune.graph.lift import lift
from edgeprune.latency.fusion import sites
from edgeprune.latency.networks import NetworkTiming, Ratio, Timings
from edgeprune.pipeline.budget import parse_budget
from edgeprune.pipeline.job import Job, run
from edgeprune.pipeline.shrink import predicted_ms
from edgeprune.pipeline.spans import dissect
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet


class Clock(Sizes):
    """Whole networks take what their kernels cost, to the last digit."""

    fingerprint: ClassVar = {"board": "none"}

    def start(self, original):
        self.original_ms = self.compare({"original": original}).networks["original"].median_ms
        return self.original_ms

    def clock(self, network):
        return predicted_ms(dissect(network), self)

    def compare(self, models, rounds=None):
        times = {}
        for name, model in models.items():
            kernels = [site.kernel for site in sites(onnx.load_model_from_string(model), self.fusion)]
            times[name] = self.constant_ms() + sum(map(self.kernel_ms, kernels))
        networks = {n: NetworkTiming(n, ms, ms, ms, ms, 5, 0.0, Ratio(ms, ms, ms)) for n, ms in times.items()}
        return Timings(networks, {n: np.full(5, ms) for n, ms in times.items()})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.branch = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.branch(torch.relu(self.norm(self.inner(x)))))
        return self.head(x.mean((2, 3)))


def pictures(seed, count):
    """Noise that differs in strength from channel to channel and from seed to seed."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 3, 8, 8)) * rng.uniform(0.1, 3, (1, 3, 1, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return lift(Net().eval(), [(1, 3, 8, 8)])


def classes(network, x):
    with torch.no_grad():
        return network.module(torch.from_numpy(x)).argmax(1).numpy()


def compress(network, method, x, test):
    y = np.arange(len(x)) % 3
    recovery = TrainConfig(steps=12, batch_size=16, augment="none", device="cpu", lr=0.01)
    data = DataSet.from_arrays(x, y)
    job = Job(network, parse_budget("60%"), find_target("cpu"), method, data=data, test=test, recovery=recovery)
    return run(job, Clock(), lambda *_: None)


@pytest.mark.parametrize("method", ["cap", "aofp"])
def test_other_test_images_change_the_figures_and_no_plan(network, method):
    """Those whose labels the original gets right, and others, more of them, whose labels it gets wrong."""
    x, right, wrong = pictures(1, 64), pictures(2, 30), pictures(3, 50)
    tests = [(right, classes(network, right)), (wrong, (classes(network, wrong) + 1) % 3)]
    first, second = (compress(network, method, x, DataSet.from_arrays(*test)) for test in tests)
    assert (first.accuracy["original"], second.accuracy["original"]) == (1.0, 0.0)
    assert first.accuracy["final"] > second.accuracy["final"]
    assert first.similarity != second.similarity
    assert any(plan.keep or plan.removed for plan in first.shrunk.recipe.steps)
    assert first.shrunk.recipe == second.shrunk.recipe
    assert first.onnx == second.onnx  # nor were the weights chosen by them
    assert first.comparison.ratio("compressed", "original").value <= 0.6
    other = compress(network, method, right, DataSet.from_arrays(*tests[0]))
    assert other.onnx != first.onnx
