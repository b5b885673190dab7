import numpy as np
import pytest
import torch
from nets import images, small
from torch import nn

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.masking import masked_outputs
from edgeprune.graph.surgery import cut, remove
from edgeprune.methods import DATA_FREE, SELECTORS
from edgeprune.prune.assess import assess
from edgeprune.prune.consumers import find_consumers, without_units
from edgeprune.prune.depth import block_damage
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import divergence
from edgeprune.prune.sensitivity import rank_groups, scaled


@pytest.fixture(scope="module")
def network():
    return small()


MEASURED = images(128)[64:]  # the judge fits on the first half


@pytest.fixture(scope="module")
def judge(network):
    return Judge(network, network, [images(128)])


@pytest.mark.parametrize(("method", "data"), [*((m, True) for m in SELECTORS), *((m, False) for m in DATA_FREE)])
def test_every_method_ranks_every_group(network, method, data):
    channels = analyse(network)
    judge = Judge(network, network, [images(64)])
    rankings = rank_groups(judge, channels, SELECTORS[method].function, data_free=not data)
    assert set(rankings) == {g.name for g in channels.groups}
    for group in channels.groups:
        ranking = rankings[group.name]
        assert sorted(ranking.order.tolist()) == list(range(group.size))
        assert ranking.damage.shape == (group.size + 1,)
        assert ranking.damage[group.size] == 0
        assert (np.diff(ranking.damage) <= 0).all()
        assert np.isfinite(ranking.damage).all()
        assert ranking.damage[1] > 0


def test_zeroed_columns_equal_masked_channels(network, judge):
    """What is tried by exchanging readers is what the cut network gives, before any refit."""
    channels = analyse(network)
    group = channels.group("blocks.1.conv1")
    consumers = find_consumers(None, judge.program, group)  # no Gram matrices: plain zeros
    modules = without_units(consumers, [0, 3, 7])
    keep = [u for u in range(group.size) if u not in (0, 3, 7)]
    expected = masked_outputs(network, channels, {group.name: keep}, (MEASURED,))
    with torch.no_grad():
        plain = network.module(MEASURED)
    assert judge.exchanged_error(modules) == pytest.approx(divergence(expected, [plain]), rel=1e-4)


def test_measured_damage_is_what_the_cut_and_refitted_network_shows(network, judge):
    channels = analyse(network)
    group = channels.group("blocks.2.conv1")
    ranking = rank_groups(judge, channels, only=[group.name], widths={group.name: [6]})[group.name]
    consumers = find_consumers(judge, judge.program, group)
    modules = without_units(consumers, ranking.order[6:].tolist())
    smaller = cut(network, channels, {group.name: ranking.keep(6)})
    kept = torch.tensor(ranking.keep(6))
    with torch.no_grad():
        leaf = smaller.module.get_submodule("blocks.2.conv2")
        leaf.weight.copy_(modules["blocks.2.conv2"].weight[:, kept])
        leaf.bias = nn.Parameter(modules["blocks.2.conv2"].bias)
        got = divergence([smaller.module(MEASURED)], [network.module(MEASURED)])
    assert got == pytest.approx(ranking.damage[6], rel=1e-3)
    plain = masked_outputs(network, channels, {group.name: ranking.keep(6)}, (MEASURED,))
    with torch.no_grad():
        assert got < divergence(plain, [network.module(MEASURED)])


def test_block_prices_are_marginal_and_rise(network, judge):
    blocks = {b.name: b for b in find_blocks(network)}
    damage = block_damage(judge, list(blocks.values()), steps=3)
    order = sorted(damage, key=damage.__getitem__)
    assert set(damage) == set(blocks)
    assert order[0] == "blocks.1"  # gain 0.1
    assert judge.program.removed == ()
    assert judge.divergence == 0
    alone = {name: block_damage(judge, [block])[name] for name, block in blocks.items()}
    assert alone[order[0]] == min(alone.values()) == damage[order[0]]
    assert all(v > 0 for v in damage.values())
    with torch.no_grad():
        both = divergence([remove(network, [blocks[n] for n in order[:2]]).module(MEASURED)], judge.expected)
    assert damage[order[0]] + damage[order[1]] < both  # repaired, against plainly removed


def test_blocks_cost_more_without_repair(network, judge):
    blocks = find_blocks(network)
    repaired = block_damage(judge, blocks, steps=1)
    plain = block_damage(judge, blocks, steps=1, repair=False)
    assert sum(plain.values()) > 1.5 * sum(repaired.values())
    outs = []
    with torch.no_grad():
        for b in blocks:
            outs.append(divergence([remove(network, [b]).module(MEASURED)], [network.module(MEASURED)]))
    assert min(plain.values()) == pytest.approx(min(outs), rel=1e-4)


def test_assessing_a_compressed_network_measures_against_the_original(network):
    smaller = remove(network, [find_blocks(network)[2]])
    shares = []
    result = assess(network, smaller, analyse(smaller), find_blocks(smaller), [images(64)], progress=shares.append)
    with torch.no_grad():
        x = images(64)[32:]
        own = divergence([smaller.module(x)], [network.module(x)])
    assert result.divergence == pytest.approx(own, rel=1e-5)
    assert set(result.blocks) == {"blocks.0", "blocks.1", "blocks.3"}
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_few_images_do_not_make_the_last_block_look_free(network):
    """The head has 9 inputs and the trial sees 12 images of it."""
    blocks = find_blocks(network)
    few, many = Judge(network, network, [images(24)]), Judge(network, network, [images(256)])
    name = blocks[-1].name
    assert block_damage(few, blocks[-1:])[name] > 0.5 * block_damage(many, blocks[-1:])[name]


def test_curves_pass_through_what_was_measured():
    cost = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
    damage = scaled(cost, {5: 0.0, 3: 0.2, 1: 0.3})
    assert damage[3] == pytest.approx(0.2)
    assert damage[1] == pytest.approx(0.3)
    assert damage[5] == 0
    assert 0.2 < damage[2] < 0.3
    assert (np.diff(damage) <= 0).all()
    assert (np.diff(scaled(cost, {5: 0.0, 3: 0.3, 1: 0.2})) <= 0).all()  # noise in the measurement
    assert (scaled(np.zeros(6), {5: 0.0, 3: 0.2})[:4] > 0).all()
