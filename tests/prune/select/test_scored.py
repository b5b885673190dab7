"""Scores of a trained network's channels follow what is left of them."""

import numpy as np
from nets import images, small

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.surgery import cut, remove
from edgeprune.prune.aims import trace_channels
from edgeprune.prune.consumers import find_consumers
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.magnitude import magnitude_in
from edgeprune.prune.select.scored import scored

SCORES = {"stem": np.array([3.0, 8, 1, 6, 2, 7, 4, 5]), "blocks.1.conv1": np.arange(12.0)}


def curves(network, current, apply=None):
    """Group name -> its curve by the scores, and by the weights that read it."""
    kept = None if apply is None else trace_channels(network, apply)
    judge = Judge(network, current, [images(8)], kept=kept)
    groups = analyse(current).groups
    selectors = [s(judge, groups) for s in (scored(network, SCORES), magnitude_in)]
    consumers = {g.name: find_consumers(judge, judge.program, g) for g in groups}
    return {g.name: tuple(s(g, consumers[g.name]) for s in selectors) for g in groups}


def test_the_order_is_that_of_the_scores():
    network = small()
    found = curves(network, network)
    for name, scores in SCORES.items():
        order = np.argsort(-scores)
        assert found[name][0].order.tolist() == order.tolist()
        np.testing.assert_allclose(found[name][0].cost[:-1], np.cumsum(scores[order][::-1])[::-1])
    by_scores, by_weights = found["blocks.0.conv1"]  # has none
    assert by_scores.order.tolist() == by_weights.order.tolist()


def test_what_is_left_keeps_its_scores():
    """After a cut, and without a block."""
    network = small()

    def apply(net):
        keep = {"stem": [0, 1, 3, 6, 7], "blocks.1.conv1": [11, 2, 5]}
        narrow = cut(net, analyse(net), keep)
        return remove(narrow, [b for b in find_blocks(narrow) if b.name == "blocks.0"])

    found = curves(network, apply(network), apply)
    assert found["stem"][0].order.tolist() == [1, 2, 4, 3, 0]  # of 3, 8, 6, 4, 5
    assert "blocks.0.conv1" not in found
    assert found["blocks.1.conv1"][0].order.tolist() == [2, 1, 0]  # of 2, 5, 11
