"""Moves tried by exchanging modules, against networks that are really cut and refitted by hand in float64."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import images, small
from torch import nn

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import cut, remove
from edgeprune.plan.greedy import hbgs, hbgts
from edgeprune.plan.problem import Axis, GroupChoice, Move, Problem, Ranking, Term
from edgeprune.prune.aims import trace_channels
from edgeprune.prune.assess import assess
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import divergence
from edgeprune.prune.trials import NetworkTrials

FITTED, MEASURED = images(128)[:64], images(128)[64:]  # as the judge halves them
RIDGE = 1e-3


def rankings_of(network, seed=0):
    rng = np.random.default_rng(seed)
    groups = analyse(network).groups
    return {g.name: Ranking(rng.permutation(g.size), np.linspace(1, 0, g.size + 1)) for g in groups}


def trials_of(network, current=None, labels=None, kept=None):
    current = current or network
    judge = Judge(network, current, [images(128)], kept=kept, labels=labels)
    return NetworkTrials(judge, analyse(current), find_blocks(current), rankings_of(current))


@pytest.fixture(scope="module")
def network():
    return small()


def patches(conv, x):
    """(n, taps * channels + 1) float64 rows that a convolution reads, in the order of its flattened weight."""
    rows = F.unfold(x.double(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    rows = rows.transpose(1, 2).reshape(-1, rows.shape[1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def narrowed(conv, x, gone):
    """A copy whose input channels ``gone`` are at zero; the rest has the best weights on the inputs ``x``: ridge least
    squares of the layer's own outputs, the bias free."""
    new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    weight = conv.weight.detach().double().flatten(1)
    bias = conv.bias.detach().double() if conv.bias is not None else torch.zeros(len(weight), dtype=torch.float64)
    rows = patches(conv, x)
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    lost = torch.zeros(conv.in_channels, taps, dtype=torch.bool)
    lost[gone] = True
    stays = torch.cat([~lost.flatten(), torch.tensor([True])])
    packed = torch.cat([weight, bias[:, None]], 1).T
    gram = rows.T @ rows
    inside = gram[stays][:, stays]
    penalty = torch.full((len(inside),), RIDGE * float(inside.diagonal()[:-1].mean()), dtype=torch.float64)
    penalty[-1] = 0
    step = torch.linalg.solve(inside + torch.diag(penalty), gram[stays][:, ~stays] @ packed[~stays])
    packed = packed.clone()
    packed[~stays] = 0
    packed[stays] += step
    with torch.no_grad():
        new.weight.copy_(packed[:-1].T.reshape(new.weight.shape))
        new.bias.copy_(packed[-1])
    return new


def seen_by(module, path, x):
    """What a layer of a module reads and gives."""
    seen = {}
    handle = module.get_submodule(path).register_forward_hook(lambda _, given, out: seen.update(x=given[0], y=out))
    with torch.no_grad():
        module(x)
    handle.remove()
    return seen["x"], seen["y"]


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_layer_error_is_that_of_the_single_layer_run_by_itself(network):
    trials = trials_of(network)
    order = trials.rankings["blocks.2.conv1"].order
    move = Move("blocks.2.conv1", 5)
    conv = network.module.get_submodule("blocks.2.conv2")
    new = narrowed(conv, seen_by(network.module, "blocks.2.conv2", FITTED)[0], order[5:])
    x, y = seen_by(network.module, "blocks.2.conv2", MEASURED)
    with torch.no_grad():
        alone = relative(new(x), y)
    assert trials.layer_error(move) == pytest.approx(alone, rel=1e-4)
    assert alone > 0.05


def test_layer_error_reads_the_present_network_and_compares_with_the_original(network):
    """With an earlier layer narrowed before, all of it done again by hand on a copy."""
    trials = trials_of(network)
    trials.accept(Move("blocks.0.conv1", 4))
    current = network.copy()
    for name, width in (("blocks.0", 4), ("blocks.2", 6)):
        path, order = f"{name}.conv2", trials.rankings[f"{name}.conv1"].order
        conv = current.module.get_submodule(path)
        new = narrowed(conv, seen_by(current.module, path, FITTED)[0], order[width:])
        if name == "blocks.2":
            x, own = seen_by(current.module, path, MEASURED)
            original = seen_by(network.module, path, MEASURED)[1]
            with torch.no_grad():
                alone, to_present = relative(new(x), original), relative(new(x), own)
        else:
            current.module.set_submodule(path, new)
    assert trials.layer_error(Move("blocks.2.conv1", 6)) == pytest.approx(alone, rel=1e-4)
    assert abs(alone - to_present) > 0.01


def test_outputs_that_nobody_reads_any_more_do_not_count(network):
    """The stem's group lies along the trunk: once it is narrower, its channels are missed by nobody."""
    trials, whole = trials_of(network), trials_of(network)
    order = trials.rankings["stem"].order
    trials.accept(Move("stem", 5))
    found = trials.layer_error(Move("blocks.1.conv1", 11))
    trials.dead.pop("blocks.1.conv2")
    assert found < 0.9 * trials.layer_error(Move("blocks.1.conv1", 11))
    assert whole.layer_error(Move("blocks.1.conv1", 11)) < found
    for path in ("stem", "blocks.1.conv2", "blocks.3.conv2"):
        leaf = trials.judge.program.modules[path]
        assert not leaf.weight[order[5:].copy()].any()
        assert leaf.weight[order[:5].copy()].any()


def test_channels_of_a_cut_network_are_compared_with_their_own(network):
    keep = {"stem": (0, 2, 3, 5, 6, 7)}
    current = cut(network, analyse(network), keep)
    kept = trace_channels(network, lambda n: cut(n, analyse(n), keep))
    trials = trials_of(network, current, kept=kept)
    path, order = "blocks.1.conv2", trials.rankings["blocks.1.conv1"].order
    new = narrowed(current.module.get_submodule(path), seen_by(current.module, path, FITTED)[0], order[7:])
    x, _ = seen_by(current.module, path, MEASURED)
    original = seen_by(network.module, path, MEASURED)[1][:, keep["stem"]]
    with torch.no_grad():
        alone = relative(new(x), original)
    assert trials.layer_error(Move("blocks.1.conv1", 7)) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(("name", "reader"), [("blocks.1", "blocks.2.conv1"), ("blocks.3", "head")])
def test_a_block_is_judged_by_the_first_layers_behind_its_sum(network, name, reader):
    """The block really removed, with the modules that the repair made: the reader's outputs, seen there."""
    trials = trials_of(network)
    block = {b.name: b for b in find_blocks(network)}[name]
    assert [str(trials.judge.program.by_name[n].target) for n in trials._readers(block)] == [reader]
    error = trials.layer_error(Move(name))
    gone = remove(network, [block])
    expected = seen_by(network.module, reader, MEASURED)[1]
    plain = relative(seen_by(gone.module, reader, MEASURED)[1], expected)
    trials.accept(Move(name))
    assert trials.judge.program.modules
    for path, module in trials.judge.program.modules.items():
        gone.module.set_submodule(path, module.eval())
    repaired = relative(seen_by(gone.module, reader, MEASURED)[1], expected)
    assert error == pytest.approx(repaired, rel=1e-4)
    assert error != pytest.approx(plain, rel=1e-3)


def test_accepting_gives_what_trying_promised(network):
    trials = trials_of(network)
    for move in (Move("blocks.0.conv1", 5), Move("blocks.2"), Move("stem", 6), Move("blocks.3.conv1", 2)):
        before = trials.judge.divergence
        promised = trials.output_error(move)
        trials.accept(move)
        assert trials.judge.divergence - before == pytest.approx(promised, rel=1e-4, abs=1e-7)
        assert trials.judge.divergence > 0
    assert trials.judge.program.removed[0].name == "blocks.2"


def test_a_repair_cannot_use_what_was_taken_away(network):
    """Removing a block refits the layer before it, whose input was narrowed: the columns stay empty."""
    trials = trials_of(network)
    gone = trials.rankings["blocks.1.conv1"].order[4:].copy()
    trials.accept(Move("blocks.1.conv1", 4))
    before = trials.judge.program.modules["blocks.1.conv2"]
    trials.accept(Move("blocks.2"))
    after = trials.judge.program.modules["blocks.1.conv2"]
    assert relative(after.weight, before.weight) > 0.01  # it was refitted
    norm = trials.judge.program.modules["blocks.1.bn1"]
    assert not norm.weight[gone].any()
    assert not norm.bias[gone].any()
    with torch.no_grad():
        emptied = after.weight.clone()
        emptied[:, gone] = 0
    assert relative(emptied, after.weight) < 1e-5


def test_moves_accepted_together_are_those_accepted_one_by_one_where_they_do_not_meet(network):
    together, single = trials_of(network), trials_of(network)
    moves = (Move("blocks.3.conv1", 5), Move("blocks.0.conv1", 5))
    together.accept(*moves)
    for move in moves:  # the later layer first: it is fitted on the untouched network then, too
        single.accept(move)
    assert together.judge.divergence == pytest.approx(single.judge.divergence, rel=1e-5)
    assert together.judge.divergence > 0


class _Concat(nn.Module):
    """Two convolutions whose outputs one layer reads side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.read, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        both = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.head(F.relu(self.read(both)).mean((2, 3)))


def test_what_is_gone_stays_gone_when_the_same_layer_loses_more(network):
    torch.manual_seed(0)
    trials = trials_of(lift(_Concat().eval(), [images(1).shape]))
    trials.accept(Move("a", 3), Move("b", 4))
    weight = trials.judge.program.modules["read"].weight
    gone = np.concatenate([trials.rankings["a"].order[3:], 8 + trials.rankings["b"].order[4:]])
    assert not weight[:, gone].any()
    assert weight.abs().sum((0, 2, 3)).count_nonzero() == 7


class _GroupNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(2, 16)
        self.read, self.head = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 5)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.uniform_(self.norm.bias, -1, 1)

    def forward(self, x):
        return self.head(F.relu(self.read(F.relu(self.norm(self.make(x))))).mean((2, 3)))


def test_accepting_gives_what_trying_promised_across_a_group_norm():
    torch.manual_seed(0)
    trials = trials_of(lift(_GroupNormed().eval(), [images(1).shape]))
    move = Move("make", trials.groups["make"].size // 2)
    promised = trials.output_error(move)
    trials.accept(move)
    assert trials.judge.divergence == pytest.approx(promised, rel=1e-4)
    assert promised > 0


def test_a_group_that_nobody_reads_any_more_costs_nothing(network):
    trials = trials_of(network)
    trials.accept(Move("blocks.2"))
    move = Move("blocks.2.conv1", 3)
    assert trials.layer_error(move) == trials.output_error(move) == trials.layer_error(Move("blocks.2")) == 0.0


def test_restart_forgets_everything(network):
    trials = trials_of(network)
    move = Move("blocks.1.conv1", 6)
    fresh = trials.layer_error(move), trials.output_error(move)
    trials.accept(Move("stem", 4), Move("blocks.0"))
    assert (trials.layer_error(move), trials.output_error(move)) != pytest.approx(fresh, rel=1e-3)
    trials.restart()
    assert (trials.layer_error(move), trials.output_error(move)) == fresh
    assert trials.judge.divergence == 0


def test_with_labels_the_loss_decides(network):
    labels = torch.arange(128) % 5
    trials = trials_of(network, labels=labels)
    move = Move("blocks.2.conv1", 3)
    path, order = "blocks.2.conv2", trials.rankings["blocks.2.conv1"].order
    current = network.copy()
    new = narrowed(current.module.get_submodule(path), seen_by(network.module, path, FITTED)[0], order[3:])
    current.module.set_submodule(path, new)
    with torch.no_grad():
        before, after = (F.cross_entropy(n.module(MEASURED), labels[64:]) for n in (network, current))
    assert trials.output_error(move) == pytest.approx(float(after - before), rel=1e-3)
    trials.accept(move)
    again = Move("blocks.2.conv1", 2)
    assert trials.output_error(again) != pytest.approx(trials_of(network, labels=labels).output_error(again), rel=1e-3)


def test_a_network_that_ends_in_a_sum_is_judged_by_its_output():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return x + self.body(x)

    torch.manual_seed(0)
    network = lift(Tail().eval(), [(1, 3, 8, 8)])
    trials = trials_of(network)
    (block,) = find_blocks(network)
    with torch.no_grad():
        plain = relative(remove(network, [block]).module(MEASURED), network.module(MEASURED))
    assert 0 < trials.layer_error(Move(block.name)) <= plain * (1 + 1e-6)


# the whole of a greedy search, on a network of three layers


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x))))).mean((2, 3))


READER = {"a": "b", "b": "c"}


def toy_problem():
    groups = (GroupChoice("a", (2, 4, 6), (1.0, 0.5, 0.0)), GroupChoice("b", (2, 4, 6, 8), (1.0, 0.6, 0.3, 0.0)))
    axes = Axis(((0, 1),)), Axis(((1, 1),))
    table = {(i, j): 0.02 * i * j + 0.05 * j for i, j in itertools.product((2, 4, 6), (2, 4, 6, 8))}
    terms = (Term("a", axes[:1], {(w,): 0.1 * w for w in (2, 4, 6)}), Term("b", axes, table))
    return Problem(groups, (), terms, 0.0)


def by_hand(network, rankings, moves):
    """The toy with these moves made one after the other: copies, columns emptied and refitted."""
    module = network.copy().module
    for move in moves:
        path = READER[move.name]
        x, _ = seen_by(module, path, FITTED)
        module.set_submodule(path, narrowed(module.get_submodule(path), x, rankings[move.name].order[move.width :]))
    return module


def latency(widths):
    a, b = widths["a"], widths["b"]
    return 0.1 * a + 0.02 * a * b + 0.05 * b


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("planner", [hbgs, hbgts])
def test_every_choice_on_a_toy_is_the_exhaustive_one(planner, seed):
    torch.manual_seed(seed)
    network = lift(Toy().eval(), [(1, 3, 8, 8)])
    rankings = rankings_of(network, seed)
    trials = NetworkTrials(Judge(network, network, [images(128)]), analyse(network), (), rankings)
    accepted = []
    accept = trials.accept
    trials.accept = lambda *moves: (accepted.extend(moves), accept(*moves))
    plan = planner(toy_problem(), trials)(latency({"a": 2, "b": 2}))
    assert plan.widths == {"a": 2, "b": 2}
    assert len(accepted) == 5
    with torch.no_grad():
        expected = [network.module(MEASURED)]
        for n, move in enumerate(accepted):
            widths = {"a": 6, "b": 8} | {m.name: m.width for m in accepted[:n]}
            options = {}
            for name, width in widths.items():
                if width > 2:
                    trial = Move(name, width - 2)
                    saved = latency(widths) - latency({**widths, name: width - 2})
                    before, after = (by_hand(network, rankings, m) for m in (accepted[:n], [*accepted[:n], trial]))
                    if planner is hbgs:
                        own = seen_by(after, READER[name], MEASURED)[1]
                        original = seen_by(network.module, READER[name], MEASURED)[1]
                        live = rankings["b"].order[: widths["b"]].copy() if READER[name] == "b" else slice(None)
                        error = relative(own[:, live], original[:, live])
                    else:
                        error = divergence([after(MEASURED)], expected) - divergence([before(MEASURED)], expected)
                    options[trial] = error / saved
            assert min(options, key=options.__getitem__) == move


def test_assessing_offers_trials_on_what_was_assessed(network):
    channels, blocks = analyse(network), find_blocks(network)
    found = assess(network, network, channels, blocks, [images(128)], images=128)
    narrow = found.trials.output_error(Move("blocks.2.conv1", 6))
    assert narrow == pytest.approx(found.rankings["blocks.2.conv1"].damage[6], rel=1e-4)
    block = min(found.blocks, key=found.blocks.__getitem__)
    assert found.trials.output_error(Move(block)) == pytest.approx(found.blocks[block], rel=1e-4)


def test_trials_keep_no_gradients(network):
    """What is kept of the original would else hold all activations behind it."""
    trials = trials_of(network)
    trials.layer_error(Move("blocks.2.conv1", 6))
    trials.accept(Move("blocks.1.conv1", 6), Move("blocks.3"))
    kept = [*trials.original.samples.values(), *itertools.chain(*trials.judge.checkpoints.values())]
    assert len(trials.original.samples) == 10
    assert not any(t.requires_grad for t in kept)
