import torch
from cifar import lifted
from nets import small
from support import random_keep

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.surgery import cut, remove
from edgeprune.prune.aims import find_fits, trace_channels
from edgeprune.prune.program import Program


def by_node(fits):
    return {f.node: f for f in fits}


def test_every_layer_aims_at_itself_when_nothing_was_removed():
    network = small()
    fits = find_fits(Program(network), Program(network))
    assert len(fits) == 10  # stem, 4 x 2, head
    joins = {b.join for b in find_blocks(network)}
    for f in fits:
        assert f.aim == f.target
    assert {f.target for f in fits if f.other} == joins  # second convolutions are judged behind the addition


def test_the_layer_before_a_gap_aims_at_its_end():
    network = small()
    blocks = find_blocks(network)
    for program in (Program(network).without(blocks[1], blocks[2]), Program(remove(network, blocks[1:3]))):
        fits = by_node(find_fits(Program(network), program))
        last = next(f for f in fits.values() if f.target == blocks[0].join)
        assert last.aim == blocks[2].join
        assert next(f for f in fits.values() if f.target == blocks[3].join).aim == blocks[3].join


def test_a_gap_behind_the_stem_is_the_stems():
    network = small()
    blocks = find_blocks(network)
    fits = find_fits(Program(network), Program(network).without(blocks[0]))
    assert fits[0].target != blocks[0].join
    assert fits[0].aim == blocks[0].join


def test_without_relu_behind_the_addition_the_sum_itself_is_aimed_at():
    from torch import nn

    from edgeprune.graph.lift import lift

    class Linear(nn.Module):  # a stack of linear bottlenecks
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

        def forward(self, x):
            x = self.a(x)
            x = x + self.b(x).relu()
            x = x + self.c(x.relu())
            return self.d(x)

    network = lift(Linear(), [(1, 4, 6, 6)])
    first, second = find_blocks(network)
    fits = by_node(find_fits(Program(network), Program(network).without(second)))
    assert fits["conv2d"].aim == "conv2d"
    fits = by_node(find_fits(Program(network), Program(network).without(first, second)))
    assert fits["conv2d"].aim == second.join


def test_surviving_channels_are_traced_through_cuts_and_removals():
    network = lifted(14)
    channels, blocks = analyse(network), find_blocks(network)
    keep = random_keep(channels, 3, 0.6)

    def apply(n):
        return remove(cut(n, channels, keep), [b for b in blocks if b.name == "layer1.1"])

    kept = trace_channels(network, apply)
    smaller = apply(network)
    assert "layer1.1.conv1" not in kept
    for path, numbers in kept.items():
        new, old = smaller.module.get_submodule(path), network.module.get_submodule(path)
        assert len(numbers) == new.weight.shape[0]
        if new.weight.dim() == 1:  # batch norms are only indexed by their own channels
            assert torch.equal(new.running_mean, old.running_mean[numbers])
    for name in ("layer1.0.conv1", "layer3.1.conv1"):
        assert kept[name].tolist() == keep[name]


def test_transposed_and_grouped_channels_are_traced():
    from torch import nn

    from edgeprune.graph.lift import lift

    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, groups=2), nn.ReLU(),
        nn.Conv2d(12, 12, 1, groups=12), nn.ReLU(), nn.Conv2d(12, 4, 1),
    )  # fmt: skip
    network = lift(module, [(1, 3, 8, 8)])
    channels = analyse(network)
    keep = random_keep(channels, 0, 0.5)
    kept = trace_channels(network, lambda n: cut(n, channels, keep))
    smaller = cut(network, channels, keep)
    for path, numbers in kept.items():
        assert torch.equal(smaller.module.get_submodule(path).bias, network.module.get_submodule(path).bias[numbers])
