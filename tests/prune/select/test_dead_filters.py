"""What every method must get right that looks at who reads a channel."""

import pytest
import torch
from nets import images
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.methods import SELECTORS
from edgeprune.prune.judge import Judge
from edgeprune.prune.sensitivity import rank_groups


@pytest.mark.parametrize("method", [name for name in SELECTORS if not name.endswith("-out")])
def test_filters_nobody_listens_to_go_first(method):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 8)
    )
    with torch.no_grad():
        module[2].weight[:, [1, 6]] = 0
    network = lift(module, [(1, 3, 8, 8)])
    ranking = rank_groups(Judge(network, network, [images(64)]), analyse(network), SELECTORS[method].function)["0"]
    assert set(ranking.order[-2:].tolist()) == {1, 6}
    assert ranking.damage[6] < 1e-9 < ranking.damage[5]
