"""UCP's gates against plain loops: what they compute, what their means are, and that they leave nothing behind."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_job import fingerprint

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.network import check
from edgeprune.graph.surgery import cut
from edgeprune.train.config import TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.learner import Lesson
from edgeprune.train.pace import Pace
from edgeprune.train.ucp import SLOPE, Gates, Settings, ucp

QUICK = {"batch_size": 16, "lr": 0.05, "augment": "none"}


class KilledError(Exception):
    pass


class Branching(nn.Module):
    """A trunk of one stage, read by two blocks, one of them grouped, and the head, four inputs a channel."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.two(F.relu(self.one(x)))
        x = x + F.relu(self.grouped(x))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def network(seed=0):
    torch.manual_seed(seed)
    module = Branching().eval()
    module.norm.running_mean.uniform_(-0.2, 0.2)
    return lift(module, [(1, 3, 8, 8)])


def samples(count=64):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 3, 8, 8)).astype(np.float32)
    x[np.arange(count), y] += 1.5
    return DataSet.from_arrays(x, y)


def gated(spread=0.0, data=None):
    """(the plain network, one with gates, the gates), their last layers random of this size."""
    plain, student = network(), network()
    channels = analyse(student)
    gates = Gates(student, channels, channels.groups, data or samples())
    torch.manual_seed(7)
    for layer in gates.gated.values():
        for gate in layer.gates:
            nn.init.normal_(gate.excite.weight, std=spread)
            nn.init.normal_(gate.excite.bias, std=spread)
    return plain, student, gates


def lesson(net=None, teacher=None, steps=40, loss="auto", **kwargs):
    net = net or network()
    widths = {g.name: tuple(range(1, g.size + 1)) for g in analyse(net).groups}
    config = TrainConfig(steps=steps, loss=loss, checkpoint_s=1e-9, **QUICK)
    return Lesson(net, teacher or net, kwargs.pop("data", samples()), widths, lambda w, r: 1.0, 0.5, config, **kwargs)


def test_gates_change_no_bit_at_the_start():
    plain, student, gates = gated()
    assert set(gates.gated) == {"one", "two", "grouped", "head"}
    x = torch.randn(5, 3, 8, 8)
    for train in (True, False):
        with torch.no_grad():
            assert torch.equal(student.module.train(train)(x), plain.module.train(train)(x))


def test_small_groups_have_one_hidden_unit():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.Linear(16, 40), nn.Linear(40, 3)]
    net = lift(nn.Sequential(*layers).eval(), [(1, 4)])
    channels = analyse(net)
    gates = Gates(net, channels, channels.groups, samples())
    shapes = {path: tuple(g.gates[0].squeeze.weight.shape) for path, g in gates.gated.items()}
    assert shapes == {"1": (1, 16), "2": (2, 40)}


def by_hand(gates, path, x):
    """(N, channels) of what ``x`` is multiplied with, sample by sample and unit by unit."""
    layer = gates.gated[path]
    scale = np.ones((len(x), x.shape[1]))
    for (_, index), gate in zip(layer.index.items(), layer.gates, strict=True):
        w1, b1, w2, b2 = (p.detach().double().numpy() for p in gate.parameters())
        for n, image in enumerate(x.detach().double().numpy()):
            s = np.array([np.mean([image[i].mean() for i in places]) for places in index.tolist()])
            g = 2 / (1 + np.exp(-SLOPE * (w2 @ np.maximum(w1 @ s + b1, 0) + b2)))
            for unit, places in enumerate(index.tolist()):
                scale[n, places] = g[unit]
    return scale


def test_means_are_those_of_a_loop_over_samples():
    data = samples(70)  # a last batch of another size
    _, student, gates = gated(0.3, data)
    read = {path: [] for path in gates.gated}
    handles = [
        layer.register_forward_pre_hook(lambda m, inputs, path=path: read[path].append(inputs[0]))
        for path, layer in gates.gated.items()
    ]
    with torch.no_grad():
        for x, _ in data.batches(1):
            student.module.eval()(x)
    for handle in handles:
        handle.remove()
    gates.settle()
    of_group = {}
    for path, inputs in read.items():
        scale = by_hand(gates, path, torch.cat(inputs))
        assert scale.std() > 0.1
        for name, index in gates.gated[path].index.items():
            mean = np.mean([scale[n, index[:, 0]] for n in range(70)], axis=0)
            np.testing.assert_allclose(gates.means[path][name], mean, rtol=1e-5)
            of_group.setdefault(name, []).append(mean)
    scores = gates.scores()
    assert {name: len(means) for name, means in of_group.items()} == {"stem": 3, "one": 1}  # readers
    for name, means in of_group.items():
        np.testing.assert_allclose(scores[name], np.mean(means, axis=0), rtol=1e-5)


def test_folding_is_multiplying_by_the_means():
    plain, student, gates = gated(0.3)
    gates.settle()
    constants = {path: layer.constant.float() for path, layer in gates.gated.items()}
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        settled = student.module.eval()(x)
        gates.fold()
        handles = [
            plain.module.get_submodule(path).register_forward_pre_hook(
                lambda m, inputs, c=c: (inputs[0] * (c if inputs[0].dim() == 2 else c.reshape(-1, 1, 1)),)
            )
            for path, c in constants.items()
        ]
        expected = plain.module(x)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(settled, expected)
        torch.testing.assert_close(student.module(x), expected)
        assert (plain.module(x) - expected).abs().max() > 0.05
    check(student)
    assert student.module.state_dict().keys() == plain.module.state_dict().keys()


def test_what_was_trained_is_what_comes_out():
    """The run ends with constant gates, so that folding them changes nothing but rounding."""
    ends = []

    class Kept(Gates):
        def fold(self):
            x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                ends.append(self.module(x))
                super().fold()
                ends.append(self.module(x))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeprune.train.ucp.Gates", Kept)
        learned = ucp(lesson())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert not learned.rankings
    check(learned.network)
    scores = np.concatenate(list(learned.scores.values()))
    assert scores.shape == (16,)
    assert scores.std() > 1e-3
    assert 0.6 < scores.mean() < 0.8  # the penalty has pulled them down to their share
    note = f"ucp: 4 layers read through gates, mean gates of 2 groups from {scores.min():.3g} to {scores.max():.3g}"
    assert learned.history.notes[-1] == note


def test_in_a_run_that_is_shortened_the_gates_settle_in_time(monkeypatch):
    """After 70 % of the 40 steps that it gets, and not of the 200 that were planned."""

    def shorten(self, schedule, notes):
        if schedule.step == 20:
            schedule.steps = 40

    trained, settled, settle, after_step = [], [], Gates.settle, Gates.after_step

    def watched(self, step, x):
        trained.append(step)
        after_step(self, step, x)

    def told(self):
        settled.append(len(trained))
        settle(self)

    monkeypatch.setattr(Pace, "keep_within_limit", shorten)
    monkeypatch.setattr(Gates, "after_step", watched)
    monkeypatch.setattr(Gates, "settle", told)
    learned = ucp(lesson(steps=200))
    assert (learned.history.steps, settled) == (40, [28])
    assert learned.network.module.state_dict().keys() == network().module.state_dict().keys()
    assert {name: s.shape for name, s in learned.scores.items()} == {"stem": (4,), "one": (12,)}


def test_a_trunk_has_one_score_and_one_width():
    """Of a stage all readers' gates count, and all its layers are cut to the same channels."""
    learned = ucp(lesson(steps=4))
    channels = analyse(learned.network)
    assert {g.name: g.size for g in channels.groups} == {n: len(s) for n, s in learned.scores.items()}
    best = np.argsort(-learned.scores["stem"])[:2]
    narrow = cut(learned.network, channels, {"stem": best.tolist()}).module
    outputs = {narrow.get_submodule(name).weight.shape[0] for name in ("stem", "two", "grouped")}
    assert outputs == {narrow.get_submodule("one").weight.shape[1]} == {4}  # a unit is a channel of each half


def chain():
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)]
    return lift(nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3)).eval(),
                [(1, 3, 8, 8)])  # fmt: skip


@pytest.mark.parametrize("unit", [2, 5])
def test_a_useless_channel_has_the_lowest_gate(unit):
    """One that the original does not look at: what its readers' weights make of it is noise."""
    teacher, student = chain(), chain()
    with torch.no_grad():
        teacher.module.get_submodule("3").weight[:, unit] = 0
        read = student.module.get_submodule("3").weight
        read[:, unit] = 0.3 * torch.randn(read[:, unit].shape, generator=torch.Generator().manual_seed(5))
    scores = ucp(lesson(student, teacher, 80, "values")).scores["0"]
    assert scores.argmin() == unit
    assert scores[unit] < 0.3 * np.median(scores)


def test_the_penalty_is_what_gates_are_above_their_share():
    """In units of the loss of a constant answer; gone with the pass that it belongs to, and with the gates."""
    _, student, gates = gated(0.3)
    gates.loss, gates.settings = 3.0, Settings(pull=0.5, low=0.6, settle=0.5)
    gates.start(100)
    x = samples().batch(np.arange(9))[0]
    values = {}
    handles = [
        gate.register_forward_hook(lambda m, i, o, key=(path, j): values.update({key: o}))
        for path, layer in gates.gated.items()
        for j, gate in enumerate(layer.gates)
    ]
    for step, share in ((9, 0.92), (24, 0.8), (80, 0.6)):
        student.module.train()(x)
        units = sum(v.shape[1] for v in values.values())
        above = sum(max(float(v.mean() - share), 0.0) * v.shape[1] for v in values.values())
        penalty = gates.penalty(step)
        assert penalty.item() == pytest.approx(0.5 * 3.0 * above / units, rel=1e-5)
        assert above > 0
        assert gates.penalty(step) is None
    penalty.backward()
    assert any(p.grad is not None and p.grad.any() for layer in gates.gated.values() for p in layer.gates.parameters())
    for handle in handles:
        handle.remove()
    gates.settle()
    student.module.train()(x)
    assert gates.penalty(80) is None


@pytest.mark.parametrize("stop_at", [23, 38])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, stop_at):
    """Killed before and after the gates became constants."""
    whole = ucp(lesson(steps=50))

    def stop(p):
        if p.step == stop_at:
            raise KilledError

    path = tmp_path / "search.pt"
    with pytest.raises(KilledError):
        ucp(lesson(steps=50, checkpoint=path, progress=stop))
    again = ucp(lesson(steps=50, checkpoint=path))
    assert again.history.resumed_from == 20
    third = ucp(lesson(steps=50, checkpoint=path))  # a finished run is not repeated
    assert third.history.resumed_from == 50
    for other in (again, third):
        assert fingerprint(other.network.module) == fingerprint(whole.network.module)
        for name, scores in whole.scores.items():
            np.testing.assert_array_equal(other.scores[name], scores)
