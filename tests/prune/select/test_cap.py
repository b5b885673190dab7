import torch
from nets import images
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.prune.consumers import find_consumers
from edgeprune.prune.judge import Judge
from edgeprune.prune.select.cap import cap
from edgeprune.prune.select.magnitude import weights


def test_sees_what_a_twin_can_take_over():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 8)
    )
    with torch.no_grad():
        module[0].weight[5], module[0].bias[5] = 4 * module[0].weight[2], 4 * module[0].bias[2]
    network = lift(module, [(1, 3, 8, 8)])
    group = analyse(network).group("0")
    judge = Judge(network, network, [images(64)])
    curve = cap(judge, [group])(group, find_consumers(judge, judge.program, group))
    assert curve.order[-1] in (2, 5)
    assert weights(judge.program, group).argmin() != 5
