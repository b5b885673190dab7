"""Which residual branches can be taken out."""

import pytest
import torch
from cifar import lifted
from pieces import ChannelsLastNorm, Concat, Residual
from torch import nn

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import remove


def blocks_of(model, shape=(1, 3, 16, 16)):
    network = lift(model.eval(), [shape])
    return network, find_blocks(network)


def conv(c_in=8, c_out=8):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Net(nn.Module):
    def __init__(self, part, c=8):
        super().__init__()
        self.stem, self.part, self.head = conv(3), part, conv(c, 2)

    def forward(self, x):
        return self.head(self.part(self.stem(x)))


class Sum(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


def modules_in(network, block):
    nodes = {n.name: n for n in network.module.graph.nodes}
    return {str(nodes[n].target) for n in block.nodes if nodes[n].op == "call_module"}


def test_a_residual_block_is_found_with_everything_that_dies_with_it():
    network, (block,) = blocks_of(Net(Residual(8, 4)))
    assert block.name == "part.body"
    assert modules_in(network, block) == {"part.body.0.0", "part.body.0.1", "part.body.2.0", "part.body.2.1"}
    nodes = {n.name: n for n in network.module.graph.nodes}
    assert nodes[block.shortcut].target == "stem"
    assert block.join in block.nodes
    assert block.branch in block.nodes
    assert block.shortcut not in block.nodes


@pytest.mark.parametrize("projection", [False, True])
def test_every_block_of_a_resnet(projection):
    network = lifted(20, projection)
    blocks = find_blocks(network)
    assert [b.name for b in blocks] == [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2)]
    first_of_stage_2 = blocks[3]
    assert {"layer2.0.conv1", "layer2.0.conv2"} <= modules_in(network, first_of_stage_2)
    assert not any("shortcut" in m for b in blocks for m in modules_in(network, b))


def test_of_two_branches_with_weights_the_longer_one_is_offered():
    short, long = conv(), nn.Sequential(conv(), nn.ReLU(), conv())
    for parts in ((short, long), (long, short)):
        network, (block,) = blocks_of(Net(Sum(*parts)))
        assert len(modules_in(network, block)) == 2


def test_of_nested_blocks_the_innermost_is_kept():
    inner = Residual(8, 4)
    _, blocks = blocks_of(Net(Sum(nn.Identity(), nn.Sequential(conv(), inner, conv()))))
    assert [b.name for b in blocks] == ["part.branches.1.1.body"]


def test_layer_scale_and_linears_belong_to_the_branch():
    network, (block,) = blocks_of(Net(ChannelsLastNorm(8)))
    assert modules_in(network, block) == {"part.depthwise", "part.up", "part.down"}
    short = remove(network, [block]).module
    assert {n.split(".")[0] for n, _ in short.named_parameters()} == {"stem", "head"}
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(short(x), network.module.head(network.module.stem(x)))


@pytest.mark.parametrize(
    "part",
    [
        Concat(8, 4),  # a concat is no sum
        nn.Sequential(conv(), nn.ReLU()),  # no sum at all
        Sum(nn.Identity(), nn.AvgPool2d(3, 1, 1)),  # nothing to save
    ],
)
def test_what_is_no_block(part):
    c = 12 if isinstance(part, Concat) else 8
    _, blocks = blocks_of(Net(part, c))
    assert blocks == ()


def test_a_branch_is_no_block_if_the_shortcut_is_smaller_or_independent_of_the_input():
    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bias = conv(), nn.Parameter(torch.randn(1, 8, 16, 16))

        def forward(self, x):
            return (self.conv(x) + self.bias) + x.mean((2, 3), keepdim=True)

    _, blocks = blocks_of(Net(Broadcast()))
    assert blocks == ()


def test_a_scaled_sum_is_no_block_but_a_scaled_branch_is():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return torch.add(x, self.conv(x), alpha=2)

    class Branch(Scaled):
        def forward(self, x):
            return x + 0.2 * self.conv(x)

    assert blocks_of(Net(Scaled()))[1] == ()
    assert [b.name for b in blocks_of(Net(Branch()))[1]] == ["part.conv"]


def test_consecutive_blocks_go_together():
    network, blocks = blocks_of(Net(nn.Sequential(Residual(8, 4), Residual(8, 4), Residual(8, 4))))
    assert [b.name for b in blocks] == [f"part.{i}.body" for i in range(3)]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network.module.head(torch.relu(network.module.stem(x)))
        torch.testing.assert_close(remove(network, blocks).module(x), expected)
        torch.testing.assert_close(remove(network, blocks[::-1]).module(x), expected)
        torch.testing.assert_close(remove(network, []).module(x), network.module(x), rtol=0, atol=0)


def test_a_module_that_is_used_elsewhere_survives_its_block():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return self.conv(x + self.conv(x))

    network, (block,) = blocks_of(Net(Again()))
    short = remove(network, [block]).module
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(short(x), short.head(short.part.conv(short.stem(x))))
