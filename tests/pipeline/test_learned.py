"""What a learner found goes through the planner and the clock: its end, a step further, a step back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stand_in_prices import Sizes
from torch import nn

import edgeprune
from edgeprune.errors import BudgetMissedError, UsageError
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import cut
from edgeprune.methods import LEARNERS, SELECTORS
from edgeprune.pipeline.apply import State, apply_recipe
from edgeprune.pipeline.judging import Judge
from edgeprune.pipeline.learned import after_search, pricing_of, search_and_shrink
from edgeprune.pipeline.shrink import predicted_ms
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.exact import exact
from edgeprune.train.config import History, TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.halving import Move, Search
from edgeprune.train.learner import Learned, Learner


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return lift(nn.Sequential(*layers, nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval(), [(1, 3, 8, 8)])


DATA = DataSet.from_arrays(np.zeros((8, 3, 8, 8), np.float32))
MOVES = {"0": [((1, 2), 0.01), ((5,), 0.04)], "2": [((0, 3, 7), 0.02)], "4": []}
END = {"0": 5, "2": 5, "4": 6}


def rankings():
    """Of searches that made these moves and were then refused everything at 0.05 and more."""
    found, spent = {}, sum(d for moves in MOVES.values() for _, d in moves)
    for (name, moves), size in zip(MOVES.items(), (8, 8, 6), strict=True):
        search = Search(size, range(1, size))
        for units, damage in moves:
            search.waiting = Move(units, damage)
            search.accept()
        search.refused = {search.width - 1: 0.05, search.width // 2: 0.2}
        found[name] = search.ranking(0.05, spent)
    return found


def run(network, share, slow=1.0):
    """-> (what it shrank to, the lesson that was given)."""
    full = predicted_ms(dissect(network), Sizes())
    lessons = []

    def train(lesson):
        lessons.append(lesson)
        return Learned(network, rankings(), {}, History(steps=5, epochs=0.5, seconds=6.0))

    def clock(net):
        return slow * predicted_ms(dissect(net), Sizes())

    shrunk = search_and_shrink(
        State(network), network, full, full, share * full, Sizes(), Learner(train), DATA, TrainConfig(epochs=4), None,
        clock, lambda *_: None, exact, False, lambda *_: pytest.fail("what is ranked needs no judge"),
    )  # fmt: skip
    return shrunk, lessons[0]


def end_share(network, widths=END):
    """Latency share of the network cut to these widths, exactly the learner's own end."""
    channels = analyse(network)
    keep = {name: ranking.keep(widths[name]) for name, ranking in rankings().items()}
    now = predicted_ms(dissect(cut(network, channels, keep)), Sizes())
    return now / predicted_ms(dissect(network), Sizes())


def widths_of(shrunk):
    return {name: shrunk.network.module.get_submodule(name).out_channels for name in END}


def test_the_end_of_the_search_is_what_is_built(network):
    shrunk, lesson = run(network, end_share(network) / 0.98)
    assert widths_of(shrunk) == END
    (plan,) = shrunk.recipe.steps
    assert plan.keep["0"] == (0, 3, 4, 6, 7)
    assert plan.keep["2"] == (1, 2, 4, 5, 6)
    assert (shrunk.rounds, shrunk.learning.steps) == (1, 5)
    assert lesson.widths["4"] == (1, 2, 3, 4, 5, 6)
    assert lesson.config.epochs == 2


def test_prices_are_those_of_the_network_cut(network):
    _, lesson = run(network, 0.7)
    full = predicted_ms(dissect(network), Sizes())
    for widths in (END, {"0": 3, "2": 8, "4": 2}):
        assert lesson.latency_ms(widths, ()) == pytest.approx(end_share(network, widths) * full)
    assert lesson.latency_ms({}, ()) == pytest.approx(full)


def test_a_width_that_is_no_candidate_has_the_price_of_the_next(network):
    anatomy, prices = dissect(network), Sizes()
    price = pricing_of(anatomy, [(2, 5, 8), (8,), (3, 6)], prices, 1.0)
    assert price({"0": 4, "4": 1}, ()) == price({"0": 5, "4": 3}, ()) < price({}, ())


def test_a_machine_that_is_slower_takes_it_further(network):
    """The network is timed slower than its kernels promise, and nothing that was given up comes back for it."""
    shrunk, _ = run(network, 1.1 * end_share(network), slow=1.16)
    assert sum(widths_of(shrunk).values()) < sum(END.values())
    assert shrunk.measured_ms <= 1.1 * end_share(network) * predicted_ms(dissect(network), Sizes())


def test_room_that_is_left_is_given_back_where_it_hurt_most(network):
    widths = {**END, "0": 6}
    shrunk, _ = run(network, end_share(network, widths) / 0.98)
    assert widths_of(shrunk) == widths


def test_blocks_have_a_price_too():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head((x + self.conv(x)).mean((2, 3)))

    anatomy = dissect(lift(Residual().eval(), [(1, 3, 8, 8)]))
    prices = Sizes()
    full = predicted_ms(anatomy, prices)
    price = pricing_of(anatomy, prices.prepare(anatomy), prices, 2.0 / full)
    (block,) = anatomy.blocks
    spans = sum(prices.kernel_ms(s.at(s.full)) for s in anatomy.spans if s.block == 0)
    assert spans > 0
    assert price({}, ()) == pytest.approx(2.0)
    assert price({}, [block.name]) == pytest.approx(2.0 - spans * 2.0 / full)


def test_recovery_gets_what_the_search_leaves():
    spent = History(steps=30, epochs=1.5, seconds=90.0)
    assert after_search(TrainConfig(epochs=4), spent).epochs == 2.5
    assert after_search(TrainConfig(minutes=10), spent).minutes == 8.5
    assert after_search(TrainConfig(steps=100), spent).steps == 70
    assert after_search(TrainConfig(), spent).epochs == 3.5
    assert after_search(TrainConfig(epochs=1), spent).epochs == 0.1  # some is always left


class Wide(nn.Module):
    """Far wider than its data need."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        self.two, self.head = nn.Conv2d(48, 48, 3, padding=1), nn.Linear(48, 3)

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.norm(self.one(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 128)
    x = rng.normal(size=(128, 3, 16, 16)).astype(np.float32)
    x[np.arange(128), y] += 1
    return {"model": lift(Wide().eval(), [(1, 3, 16, 16)]), "data": (x, y), "latency": "60%"}


def test_compress_with_a_learner(job, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path / "home"))
    arguments = {**job, "method": "aofp", "epochs": 24, "out": tmp_path / "out"}
    try:
        first = edgeprune.compress(**arguments)
    except BudgetMissedError:
        pytest.skip("this machine was too busy to measure")
    (note,) = [w for w in first.report.notes if w.startswith("aofp: ")]
    assert "moves, predicted" in note
    assert first.report.ratio[0] <= 0.62
    assert first.report.method == "aofp"
    assert first.report.certificate < 1e-4
    assert first.recipe.steps[0].keep
    assert [p.name for p in (tmp_path / "out" / "work").glob("search-*.pt")]
    again = edgeprune.compress(**arguments)  # nothing is searched or trained again
    assert again.recipe == first.recipe
    for a, b in zip(again.network.module.parameters(), first.network.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.report.seconds["shrink"] < 0.5 * first.report.seconds["shrink"]


def test_scores_decide_which_channels_go(job, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path / "home"))
    method, lessons = LEARNERS["ucp"], []

    def train(lesson):
        lessons.append(method.function.train(lesson))
        return lessons[-1]

    monkeypatch.setitem(LEARNERS, "ucp", replace(method, function=Learner(train)))
    try:
        result = edgeprune.compress(**job, method="ucp", epochs=8, out=tmp_path / "out")
    except BudgetMissedError:
        pytest.skip("this machine was too busy to measure")
    (learned,) = lessons
    assert any(note.startswith("ucp: 2 layers") for note in result.report.notes)
    assert result.report.ratio[0] <= 0.62
    assert result.report.certificate < 1e-4
    left = {name: np.arange(len(scores)) for name, scores in learned.scores.items()}
    assert set(left) == {"one", "two"}
    assert len(result.recipe.steps) > 1  # the scores go along with what the rounds before have left
    for plan in result.recipe.steps:
        for name, units in plan.keep.items():
            scores = learned.scores[name][left[name]]
            assert scores[list(units)].min() > np.delete(scores, units).max()
            left[name] = left[name][list(units)]
    assert sum(map(len, left.values())) < 96
    assert result.network.module.get_submodule("one").weight.shape[0] == len(left["one"])


def test_compress_with_layers_and_channels_learnt_together(job, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path / "home"))
    try:
        result = edgeprune.compress(**job, method="adaptive", epochs=12, out=tmp_path / "out")
    except BudgetMissedError:
        pytest.skip("this machine was too busy to measure")
    (note,) = [n for n in result.report.notes if n.startswith("adaptive: ")]
    assert "units of channels came to zero, predicted" in note
    assert result.report.ratio[0] <= 0.62
    assert result.report.method == "adaptive"
    assert result.report.certificate < 1e-4
    assert any(plan.keep or plan.removed for plan in result.recipe.steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "give --data"),
        ({"minutes": 0}, "--minutes above 0"),
        ({"planner": "hbgs"}, "use --planner exact"),
    ],
)
def test_what_a_learner_needs_is_said_at_once(job, change, message):
    with pytest.raises(UsageError, match=message):
        edgeprune.compress(**{**job, "method": "aofp", **change})


class Blocks(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(i, width, 3, padding=1) for i in (3, width, width))
        self.inner, self.head = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.one(x))
        x = torch.relu(x + self.inner(torch.relu(self.two(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("spoilt", [True, False])
def test_after_a_search_the_weights_nearer_to_the_original_go_on(spoilt):
    """Those from before it, without the layers that it gave up, or those that it left."""
    torch.manual_seed(0)
    original, prices = lift(Blocks(8).eval(), [(1, 3, 8, 8)]), Sizes()
    trained = original.copy()
    with torch.no_grad():
        trained.module.get_submodule("stem").weight.mul_(-1 if spoilt else 0.99)
    data = DataSet.from_arrays(np.random.default_rng(0).normal(size=(64, 3, 8, 8)).astype(np.float32))
    full, originals = predicted_ms(dissect(original), prices), []
    learner = Learner(lambda lesson: Learned(trained, {}, {}, History(), removed=("one",)))

    def judge_of(network, scores):
        originals.append(network)
        return Judge(network, SELECTORS["cap"].function, [x for x, _ in data.batches(64)], lambda *_: None)

    shrunk = search_and_shrink(
        State(original), original, full, full, 0.8 * full, prices, learner, data, TrainConfig(epochs=4), None,
        lambda net: predicted_ms(dissect(net), prices), lambda *_: None, exact, True, judge_of,
    )  # fmt: skip
    assert any("from before the search" in note for note in shrunk.learning.notes) == spoilt
    assert ((shrunk.recipe.steps[0].removed, dict(shrunk.recipe.steps[0].keep)) == (("one",), {})) == spoilt
    assert (originals[-1] is trained) != spoilt
    assert shrunk.measured_ms <= 0.8 * full
    form = {name: p.shape for name, p in apply_recipe(original, shrunk.recipe).module.named_parameters()}
    assert {name: p.shape for name, p in shrunk.network.module.named_parameters()} == form


def test_a_learner_of_widths_starts_without_blocks(job, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path / "home"))
    torch.manual_seed(0)
    model = lift(Blocks().eval(), [(1, 3, 16, 16)])
    arguments = {**job, "model": model, "method": "aofp", "epochs": 8, "latency": "33%", "out": tmp_path / "out"}
    try:
        found = edgeprune.compress(**arguments)
    except BudgetMissedError:
        pytest.skip("this machine was too busy to measure")
    blocks, widths = found.recipe.steps
    assert blocks.removed
    assert not blocks.keep
    assert widths.keep
    assert not widths.removed
    assert tuple(found.report.removed) == blocks.removed
    assert found.report.certificate < 1e-4
    (tmp_path / "out" / "work" / "shrunk.pt").unlink()  # as if the run had been killed in the search
    monkeypatch.setattr("edgeprune.pipeline.job.blocks_first", lambda *_: pytest.fail("they are written down"))
    try:
        again = edgeprune.compress(**arguments)
    except BudgetMissedError:
        pytest.skip("this machine was too busy to measure")
    assert again.recipe.steps[0] == found.recipe.steps[0]
