"""Compressing to a smaller input, through the whole pipeline, measured for real on this machine."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgeprune import api
from edgeprune.errors import BudgetMissedError, UnsupportedModelError, UsageError
from edgeprune.graph.lift import lift
from edgeprune.graph.resolution import at_resolution
from edgeprune.pipeline.apply import apply_recipe
from edgeprune.pipeline.resolution import parse_resolution
from edgeprune.plan.problem import Plan, Recipe


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.down = nn.Conv2d(32, 32, 3, 4, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.relu(self.down(self.blocks(torch.relu(self.stem(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return lift(Net().eval(), [(1, 3, 32, 32)])


@pytest.fixture(scope="module")
def data(net):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(120, 3, 8, 8)).astype(np.float32)).repeat_interleave(4, 2)
    x = x.repeat_interleave(4, 3) + 0.1 * torch.from_numpy(rng.normal(size=(120, 3, 32, 32)).astype(np.float32))
    with torch.no_grad():
        return x.numpy(), net.module(x).argmax(1).numpy()


@pytest.fixture(autouse=True)
def table(tmp_path_factory, monkeypatch):
    """One latency table for all of this file."""
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path_factory.getbasetemp() / "resolution_home"))


def compressed(net, data, **options):
    """A busy machine may miss a budget by measurement; everything else must hold."""
    try:
        return api.compress(net, data=data, images=32, **options)
    except BudgetMissedError as missed:
        if missed.result is None:
            raise
        return missed.result


def test_cut_at_a_smaller_input(net, data, tmp_path):
    result = compressed(net, data, latency="40%", resolution="24", epochs=1, out=tmp_path)
    report = result.report
    assert result.network.input_shapes == ((1, 3, 24, 24),)
    assert report.input_shapes == [[1, 3, 24, 24]]
    assert result.recipe.resolution == (24, 24)
    assert result.recipe.steps  # 24 x 24 alone is more than half: more had to go
    assert report.ratio[0] < 0.55
    assert report.predicted_ms <= 1.15 * report.budget_ms
    assert report.certificate < 1e-4
    assert report.verification["error"] < 1e-4
    assert report.verification["given"] > 0
    assert report.after.macs < 0.6 * report.before.macs
    assert None not in (report.before.accuracy, report.after.accuracy, report.agreement)

    model = onnx.load(tmp_path / "model.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 24, 24]
    told = {p.key: p.value for p in model.metadata_props}
    assert told["edgeprune.input_size"] == "24x24"
    written = json.loads((tmp_path / "report.json").read_text())
    assert "resize" in written["preprocessing"]
    assert written["preprocessing"] == told["edgeprune.preprocessing"]
    assert "24x24" in result.text()
    original = onnx.load(tmp_path / "original.onnx")
    assert [d.dim_value for d in original.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]

    x = np.random.default_rng(1).normal(size=(1, 3, 24, 24)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    retrained = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], retrained, rtol=1e-3, atol=1e-4)

    recipe = Recipe.from_json((tmp_path / "plan.json").read_text())
    again = apply_recipe(net, recipe)
    assert again.input_shapes == ((1, 3, 24, 24),)
    shapes = {n: t.shape for n, t in result.network.module.state_dict().items() if n.endswith("weight")}
    assert {n: again.module.state_dict()[n].shape for n in shapes} == shapes

    if report.met:  # the same command goes on where it was
        said: list[str] = []
        options = {"latency": "40%", "resolution": "24x24", "epochs": 1, "out": tmp_path}
        assert compressed(net, data, progress=lambda *s: said.append(s[2]), **options).recipe == recipe
        assert "judging channels and blocks" not in said


def test_the_resolution_decided_with_depth_and_width(net, data, tmp_path):
    said = []
    options = {"latency": "45%", "planner": "3d", "epochs": 0, "out": tmp_path}
    result = compressed(net, data, progress=lambda *s: said.append(s[2]), **options)
    report = result.report
    told = report.scaling["chosen"]
    assert "weighing depth, width and resolution" in said
    assert (1, 3, *told["input"]) == result.network.input_shapes[0] == tuple(report.input_shapes[0])
    assert result.recipe.resolution == (None if told["input"] == [32, 32] else tuple(told["input"]))
    assert {s["resolution"] for s in report.scaling["samples"]} > {1.0}
    assert told["predicted_ms"] <= told.get("budget_ms", report.budget_ms) * 1.3  # two measurements apart
    assert report.ratio[0] < 0.6
    assert report.certificate < 1e-4
    assert report.verification["error"] < 1e-4
    model = onnx.load(tmp_path / "model.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, *told["input"]]
    assert "weighed on" in result.text()
    if report.met:
        said.clear()
        again = compressed(net, data, progress=lambda *s: said.append(s[2]), **options)
        assert again.report.scaling == report.scaling
        assert "weighing depth, width and resolution" not in said


def test_deciding_needs_images_and_a_free_hand(net, data):
    for options in ({"resolution": "auto"}, {"planner": "3d"}):
        with pytest.raises(UsageError, match="give --data"):
            api.compress(net, latency="50%", **options)
    with pytest.raises(UsageError, match="--planner 3d decides the resolution itself; leave --resolution 16 out"):
        api.compress(net, latency="50%", data=data, planner="3d", resolution="16")


def test_a_small_input_that_is_enough_leaves_the_network_whole(net, data):
    result = compressed(net, data, latency="80%", resolution=16, epochs=0)
    assert result.recipe == Recipe((), (16, 16))
    assert result.report.ratio[0] < 0.5
    assert result.report.widths == {}
    small = at_resolution(net, (16, 16))
    (x,) = small.random_inputs(2)
    with torch.no_grad():
        assert torch.equal(result.network.module(x), net.module(x))


def test_a_network_with_baked_sizes_is_refused(data):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, 4, 1), nn.Linear(8 * 8 * 8, 4)

        def forward(self, x):
            return self.head(self.conv(x).flatten(1))

    with pytest.raises(UnsupportedModelError, match="baked in.*leave --resolution out"):
        api.compress(Flat().eval(), input_shape=(1, 3, 32, 32), latency="50%", data=data, resolution="24")
    with pytest.raises(UnsupportedModelError, match="baked in.*leave --resolution out"):
        api.compress(Flat().eval(), input_shape=(1, 3, 32, 32), latency="50%", data=data, resolution="auto")


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", (24, 24)), ("24x16", (24, 16)), (" 16 X 32 ", (16, 32)), (24, (24, 24)), (None, None), ("auto", "auto")],
)
def test_sizes_as_people_write_them(net, text, size):
    assert parse_resolution(text, net) == size


@pytest.mark.parametrize("text", ["", "0", "32", "32x32", "64", "16x64", "24x", "-24", "half", "24.5"])
def test_what_is_no_smaller_size(net, text):
    with pytest.raises(UsageError, match="--resolution"):
        parse_resolution(text, net)


def test_a_recipe_keeps_its_resolution():
    recipe = Recipe((Plan({"a": 3}),), (24, 16))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(Recipe(()).to_json()).resolution is None
    with pytest.raises(UsageError, match="not a plan"):
        Recipe.from_json(recipe.to_json().replace("24", '"tall"'))
