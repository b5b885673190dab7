"""Factoring before the rounds: where made-up prices say that it pays and only there, and once through a real run."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.cli import main
from edgeprune.errors import TableError, UsageError, VerificationError
from edgeprune.graph.channels import analyse
from edgeprune.graph.factor import factored
from edgeprune.graph.lift import lift
from edgeprune.latency.kernel import multiply_adds
from edgeprune.methods import SELECTORS
from edgeprune.pipeline import workdir
from edgeprune.pipeline.apply import State, apply_recipe
from edgeprune.pipeline.certificate import certify, certify_factored
from edgeprune.pipeline.judging import Judge
from edgeprune.pipeline.lowrank import begin, offers
from edgeprune.pipeline.redesign import fresh
from edgeprune.pipeline.shrink import Shrunk, predicted_ms, shrink
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.exact import exact
from edgeprune.plan.problem import Factoring, Plan, Recipe
from edgeprune.prune.select.fp import backward


class Prices:
    """Milliseconds of a kernel: its multiply-adds, and ``each`` for calling it. Knows nothing of broken kernels."""

    fusion = None

    def __init__(self, each=0.0, broken=lambda kernel: False):
        self.each, self.broken, self.renewed = each, broken, 0

    def prepare(self, anatomy):
        return [tuple(range(1, g.size + 1)) for g in anatomy.channels.groups]

    def kernel_ms(self, kernel):
        if self.broken(kernel):
            raise TableError("could not be measured")
        return multiply_adds(kernel) * 1e-4 + (self.each if kernel.op == "Conv" else 0.0)

    def constant_ms(self):
        return 0.01

    def stand_in(self, anatomy, kernels):
        self.stood = len(kernels)

    def renew(self, anatomy):
        self.renewed += 1


def planted(side, rank=3, size=8, idle=None):
    """A middle layer of ``rank`` independent filters or slices among ``size``; ``idle``: with which factor the latter
    half of its channels is read, and that of the channels it reads."""
    torch.manual_seed(1)
    conv = nn.Conv2d(size, size, 3, padding=1)
    with torch.no_grad():
        units = conv.weight.transpose(0, 1) if side == "inputs" else conv.weight
        units[rank:] = torch.einsum("gk,k...->g...", torch.randn(size - rank, rank), units[:rank].clone())
    head = nn.Conv2d(size, 5, 3)
    if idle is not None:
        with torch.no_grad():
            head.weight[:, size // 2 :] *= idle
            conv.weight[:, size // 2 :] *= idle
    layers = [nn.Conv2d(3, size, 3, padding=1), nn.ReLU(), conv, nn.ReLU(), head, nn.Flatten(), nn.Linear(5 * 36, 4)]
    return lift(nn.Sequential(*layers).eval(), [(1, 3, 8, 8)])


def latency(network, prices):
    return predicted_ms(dissect(network), prices)


def begun(network, prices, share=0.8, clock=None, data=True):
    """What comes of factoring; ``clock``: what a network measures, by default what is predicted."""
    batches = [torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(2))] if data else []
    selector = SELECTORS["cap" if data else "magnitude-in"].function

    def judge_of(thinner):
        return Judge(network, selector, batches, lambda *_: None, None, thinner)

    full = latency(network, prices)
    return begin(
        network, full, full, share * full, prices, judge_of, batches, backward,
        clock or (lambda net: latency(net, prices)), lambda *_: None,
    )  # fmt: skip


@pytest.mark.parametrize("data", [True, False], ids=["images", "none"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_planted_layer_is_factored_at_its_rank(side, data):
    network = planted(side)
    found = begun(network, Prices(), data=data)
    (factoring,) = found.factored
    assert factoring.layer == "2"
    assert len(getattr(factoring, side)) == 3
    assert getattr(factoring, "inputs" if side == "outputs" else "outputs") is None
    assert found.notes == ()
    assert found.measured_ms == pytest.approx(latency(found.network, Prices()))
    assert found.measured_ms < 0.9 * latency(network, Prices())
    x = network.random_inputs(4)
    with torch.no_grad():
        torch.testing.assert_close(found.network.module(*x), network.module(*x), rtol=0, atol=1e-5)


def test_nothing_where_the_triple_is_slower():
    network = planted("outputs")
    most = max(Prices().kernel_ms(s.site.kernel) for s in dissect(network).spans)
    assert offers(dissect(network), Prices())
    assert not offers(dissect(network), Prices(each=most))
    found = begun(network, Prices(each=most), share=0.9)
    assert found.factored == ()
    assert found.network is network
    (note,) = found.notes
    assert "no triple of kernels is faster" in note


def test_nothing_where_the_target_cannot_run_the_1x1():
    def is_1x1(kernel):
        return kernel.attr("kernel_shape") == "1x1"

    found = begun(planted("outputs"), Prices(broken=is_1x1))
    assert found.factored == ()
    assert "no triple" in found.notes[0]


@pytest.mark.parametrize(("idle", "words"), [(0.0, "no damage"), (0.05, "narrowing costs")])
def test_nothing_where_narrowing_is_cheaper_for_each_millisecond(idle, words):
    """Half of the channels are hardly needed: to factor them out is as cheap as to cut them, and saves less."""
    found = begun(planted("outputs", rank=8, idle=idle), Prices())
    assert found.factored == ()
    assert words in found.notes[0]


def test_nothing_where_the_whole_network_gets_no_faster():
    network = planted("outputs")
    full = predicted_ms(dissect(network), Prices())
    prices = Prices()
    found = begun(network, prices, clock=lambda net: 0.99 * full)
    assert found.factored == ()
    assert "timed whole" in found.notes[0]
    assert prices.renewed


def test_the_better_half_is_tried_where_the_whole_choice_gets_no_faster():
    """Of two layers that are worth it, the one that hurts less for what it saves."""
    network = planted("outputs")
    parts = [network.module.get_submodule(name) for name in ("0", "2", "4", "6")]
    worse = nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        worse.weight[3:] = torch.einsum("gk,k...->g...", torch.randn(5, 3), worse.weight[:3].clone())
        worse.weight[3:] += 0.005 * torch.randn(5, 8, 3, 3)
    layers = [parts[0], nn.ReLU(), parts[1], nn.ReLU(), worse, nn.ReLU(), parts[2], nn.Flatten(), parts[3]]
    network = lift(nn.Sequential(*layers).eval(), [(1, 3, 8, 8)])
    full = latency(network, Prices())

    def clock(net):
        return full if {"2_core", "4_core"} <= net.modules_called().keys() else latency(net, Prices())

    assert {f.layer for f in begun(network, Prices()).factored} == {"2", "4"}
    assert [f.layer for f in begun(network, Prices(), clock=clock).factored] == ["2"]


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_the_rounds_go_on_with_an_ordinary_network(side, tmp_path):
    """Inner ranks are cut like any channels, the certificates hold, and the saved plan gives the same form."""
    network, prices = planted(side), Prices()
    factorings = (Factoring("2", **{side: (0, 1, 2, 4, 5, 7)}),)  # three would do
    start = factored(network, factorings)
    batches = [torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(2))]
    judge = Judge(network, SELECTORS["cap"].function, batches, lambda *_: None, None, start)
    full = latency(network, prices)
    result = shrink(
        start, full, 0.4 * full, prices, judge.judge, judge.repair, lambda net: latency(net, prices), lambda *_: None,
        exact, True, latency(start, prices),
    )  # fmt: skip
    recipe = Recipe(result.recipe.steps, None, factorings)
    inner = {g.name for g in analyse(start).groups} - {g.name for g in analyse(network).groups}
    assert any(inner & plan.keep.keys() for plan in recipe.steps)
    assert result.measured_ms <= 0.4 * full
    assert certify_factored(network, start, recipe.factored) <= 1e-5
    assert certify(start, recipe) <= 1e-5
    shapes = {k: v.shape for k, v in result.network.module.state_dict().items() if k.endswith("weight")}
    for again in (apply_recipe(network, Recipe.from_json(recipe.to_json())), fresh(network, recipe)):
        assert {k: v.shape for k, v in again.module.state_dict().items() if k.endswith("weight")} == shapes
    kept = Shrunk(recipe, result.network, 0.5, 1.0, 2, (), None, ("a note",))
    workdir.store(tmp_path, "key", kept)
    back = workdir.recall(tmp_path, "key", network)
    assert back.notes == ("a note",)
    x = network.random_inputs(2)
    with torch.no_grad():
        assert torch.equal(back.network.module(*x), result.network.module(*x))


def test_inner_layers_are_repaired_towards_what_they_gave():
    """Channels in front of a factored layer go: its first convolution must be refitted too, not only the last."""
    network = planted("outputs", rank=8)
    start = factored(network, [Factoring("2", None, (0, 1, 2, 3, 4, 5))])
    x = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    plan = Plan({"0": 6}, keep={"0": (0, 1, 2, 3, 5, 7)})
    cut = apply_recipe(start, Recipe((plan,)))
    errors = {}
    for name, known in (("inner", start), ("last only", None)):
        judge = Judge(network, SELECTORS["cap"].function, [x], lambda *_: None, None, start)
        judge.inner = known
        repaired = judge.repair(State(cut, Recipe((plan,))))
        with torch.no_grad():
            errors[name] = float((repaired.module(x) - network.module(x)).square().mean())
            errors["none"] = float((cut.module(x) - network.module(x)).square().mean())
    assert errors["inner"] < errors["last only"] < errors["none"]


def test_a_factoring_that_is_not_what_its_kernels_come_to_is_an_error():
    network = planted("outputs")
    factorings = [Factoring("2", None, (0, 1, 2))]
    start = factored(network, factorings)
    assert certify_factored(network, start, factorings) <= 1e-5
    wrong = factored(network, factorings)
    wrong.module.get_submodule("2_core").padding = (0, 0)
    wrong.module.get_submodule("2").padding = (1, 1)
    with pytest.raises(VerificationError, match="--lowrank"):
        certify_factored(network, wrong, factorings)


def test_a_plan_with_factorings_as_json():
    factorings = (Factoring("x", (0, 2), None), Factoring("y", None, (1,)))
    recipe = Recipe((Plan({"a": 1}, keep={"a": (0,)}),), (8, 9), factorings)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert "factored" not in json.loads(Recipe(()).to_json())
    with pytest.raises(UsageError, match="not a plan"):
        Recipe.from_json(json.dumps({"version": 1, "steps": [], "factored": [{"layer": "x"}]}))


def test_learners_are_refused(tmp_path):
    network = planted("outputs")
    with pytest.raises(UsageError, match="--lowrank"):
        edgeprune.compress(network, latency="60%", data=np.zeros((8, 3, 8, 8), np.float32), method="aofp", lowrank=True)


class Wide(nn.Module):
    """A layer of 128 channels, 16 of which say all, and which narrowing cannot touch: they are the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.front, self.wide = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 192, 3, padding=1)
        with torch.no_grad():
            filters = self.wide.weight
            filters[16:] = torch.einsum("gk,k...->g...", torch.randn(176, 16) / 4, filters[:16].clone())

    def forward(self, x):
        return self.wide(torch.relu(self.front(x)))


def test_from_the_command_to_a_fresh_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path / "home"))
    network = lift(Wide().eval(), [(1, 3, 24, 24)])
    edgeprune.save(network, tmp_path / "net.pt2")
    x = np.random.default_rng(0).normal(size=(64, 3, 24, 24)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    out = tmp_path / "out"
    code = main([
        "compress", str(tmp_path / "net.pt2"), "--latency", "60%", "--lowrank", "--minutes", "0", "--images", "48",
        "--data", str(tmp_path / "data.npz"), "--threads", "1", "--out", str(out),
    ])  # fmt: skip
    assert code in (0, 9), capsys.readouterr()  # 9: a busy machine measured above the budget
    report = json.loads((out / "report.json").read_text())
    assert report["factored"]["wide"]["outputs"][1] == 192
    assert "layers factored: wide (" in capsys.readouterr().out
    assert report["certificate"] <= 1e-4
    assert report["ratio"][0] < 0.7
    assert report["output_error"] < 0.05
    session = onnxruntime.InferenceSession(out / "model.onnx")
    compressed = edgeprune.load(out / "model.pt2")
    with torch.no_grad():
        expected = compressed.module(torch.from_numpy(x[:1])).numpy()
    found = session.run(None, {session.get_inputs()[0].name: x[:1]})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    recipe = Recipe.from_json((out / "plan.json").read_text())
    assert "wide" in [f.layer for f in recipe.factored]
    fresh_file = str(tmp_path / "fresh.pt2")
    assert main(["rebuild", str(tmp_path / "net.pt2"), str(out / "plan.json"), "--out", fresh_file, "--seed", "7"]) == 0
    rebuilt, given = (n.module.state_dict() for n in (edgeprune.load(fresh_file), compressed))
    weights = {k: tuple(v.shape) for k, v in given.items() if k.endswith("weight")}
    assert {k: tuple(v.shape) for k, v in rebuilt.items() if k.endswith("weight")} == weights
    assert not any(torch.equal(rebuilt[k], given[k]) for k in weights)
