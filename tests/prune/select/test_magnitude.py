import torch
from nets import images
from torch import nn

from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.prune.consumers import find_consumers
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program
from edgeprune.prune.select.magnitude import magnitude, magnitude_in, reading, weights


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 2)
        nn.init.uniform_(self.norm.weight, 0.2, 2)
        nn.init.uniform_(self.norm.running_var, 0.2, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.make(x)))
        return self.head(torch.relu(self.a(x) + self.b(x)).mean((2, 3)))


def read(module):
    torch.manual_seed(0)
    network = lift(module.eval(), [(1, 3, 8, 8)])
    group = analyse(network).group("make")
    return network, group, find_consumers(None, Program(network), group)


def test_reading_weights_are_summed_over_readers_and_their_parts():
    torch.manual_seed(1)
    module = TwoReaders()
    _, group, consumers = read(module)
    assert group.size == 3  # the grouped reader ties channels u and u + 3
    a = module.a.weight.detach().double().square().sum((0, 2, 3)).reshape(2, 3).sum(0)
    b = [w.double().square().sum((0, 2, 3)) for w in module.b.weight.detach().split(2)]
    expected = sum(norms / norms.sum() for norms in (a, *b))
    torch.testing.assert_close(reading(consumers), expected)
    network, group, consumers = read(module)
    judge = Judge(network, network, [images(8)])
    assert magnitude_in(judge, [group])(group, consumers).order.tolist() == expected.argsort(descending=True).tolist()


def test_rescaling_a_channel_against_its_readers_changes_no_magnitude():
    torch.manual_seed(2)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 6))
    network = lift(module.eval(), [(1, 3, 8, 8)])
    group = analyse(network).group("0")
    before = weights(Program(network), group)
    own = module[0].weight.detach().double().square().sum((1, 2, 3)) / (1 + module[1].eps)
    other = module[3].weight.detach().double().square().sum((0, 2, 3))
    torch.testing.assert_close(before, own * other)
    with torch.no_grad():
        factor = torch.tensor([3.0, 0.5, 1, 1, 2, 0.1])
        for leaf in (network.module.get_submodule("1"), module[1]):
            leaf.weight.copy_(factor)
        network.module.get_submodule("3").weight.copy_(module[3].weight / factor[:, None, None])
    torch.testing.assert_close(weights(Program(network), group), before)
    judge = Judge(network, network, [images(8)])
    found = magnitude(judge, [group])(group, find_consumers(None, judge.program, group))
    assert found.order.tolist() == before.argsort(descending=True).tolist()
