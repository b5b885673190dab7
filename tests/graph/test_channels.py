"""Which channels are found to belong together: exact groups, slots, labels and axes of small networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cifar import lifted
from pieces import ChannelsLastNorm, Concat, Residual, Shuffle, SpaceToDepth, Split, SqueezeExcite, Twice
from support import relative_error
from torch import nn

from edgeprune.errors import UsageError
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.plan.problem import Axis


class Between(nn.Module):
    """A first and a last convolution around the part under test; 8 channels in, 16 x 16."""

    def __init__(self, part, c_out=8, c_in=8):
        super().__init__()
        self.first, self.part, self.last = nn.Conv2d(3, c_in, 3, padding=1), part, nn.Conv2d(c_out, 5, 1)

    def forward(self, x):
        return self.last(self.part(self.first(x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def found(part, c_out=8, c_in=8):
    network = lift(Between(part, c_out, c_in).eval(), [(1, 3, 16, 16)])
    return network, analyse(network)


def slots(group):
    return [(s.target, s.role, s.dim, s.index.tolist()) for s in group.slots]


def test_a_chain_of_convolutions_has_one_group_each_and_keeps_its_output():
    network = lift(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)).eval(), [(1, 3, 16, 16)])
    channels = analyse(network)
    (group,) = channels.groups
    each = [[i] for i in range(4)]
    assert (group.name, group.size) == ("0", 4)
    assert slots(group) == [("0", "out", 0, each), ("1", "channel", 0, each), ("2", "in", 1, each)]
    assert channels.unknown_ops == ()
    assert channels.offsets == (0,)


def test_labels_have_the_shape_of_the_output_and_stride_0_along_all_dims_but_one():
    network, channels = found(nn.ReLU())
    for node in network.module.graph.nodes:
        if node.name not in channels.labels:  # a size
            continue
        labels = channels.labels[node.name]
        assert labels.dtype == torch.int64
        assert sum(s != 0 and size > 1 for s, size in zip(labels.stride(), labels.shape, strict=True)) <= 1
    relu = channels.labels["relu"]
    assert relu.shape == (1, 8, 16, 16)
    assert torch.equal(relu[0, :, 3, 5], torch.arange(8))
    assert (channels.labels["x"] == -1).all()


def test_residual_additions_join_their_operands():
    _, channels = found(nn.Sequential(Residual(8, 6), Residual(8, 4)))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8), ("part.0.body.0.0", 6), ("part.1.body.0.0", 4)]
    targets = {(s.target, s.role) for s in channels.group("first").slots}
    assert {("part.0.body.2.0", "out"), ("part.1.body.2.0", "out"), ("last", "in")} <= targets


def test_a_gate_of_one_channel_is_not_joined_with_what_it_is_broadcast_over():
    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, x):
            return x * torch.sigmoid(self.gate(x))

    _, channels = found(Spatial())
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8)]


def test_squeeze_excite_joins_its_gate_with_the_trunk():
    _, channels = found(SqueezeExcite(8))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8), ("part.down", 2)]
    assert ("part.up", "out") in {(s.target, s.role) for s in channels.group("first").slots}


def test_concat_keeps_its_parts_apart_and_its_axis_is_their_sum():
    network, channels = found(Concat(8, 4), c_out=12)
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8), ("part.branch.0", 4)]
    last = channels.group("part.branch.0").slots[-1]
    assert (last.target, last.role, last.index.ravel().tolist()) == ("last", "in", [8, 9, 10, 11])
    assert channels.axis("cat", 1) == Axis(((0, 1), (1, 1)), 0)
    assert channels.axis("cat", 2) == Axis((), 16)
    assert channels.axis("x", 1) == Axis((), 3)
    output = next(n for n in network.module.graph.nodes if n.target == "last")
    assert channels.axis(output.name, -3) == Axis((), 5)


def test_the_parameter_free_shortcut_makes_a_trunk_of_three_groups():
    network = lifted(20)
    channels = analyse(network)
    sizes = {g.name: g.size for g in channels.groups if "conv1" not in g.name.split(".")[2:]}
    assert sizes == {"conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32}
    index = {g.name: i for i, g in enumerate(channels.groups)}
    trunk = {name: next(n.name for n in network.module.graph.nodes if n.target == name)
             for name in ("layer1.2.conv2", "layer2.2.conv2", "layer3.2.conv2")}  # fmt: skip
    terms = [(index[g], 1) for g in ("conv1", "layer2.0.conv2", "layer3.0.conv2")]
    assert channels.axis(trunk["layer1.2.conv2"], 1) == Axis(tuple(terms[:1]), 0)
    assert channels.axis(trunk["layer2.2.conv2"], 1) == Axis(tuple(terms[:2]), 0)
    assert channels.axis(trunk["layer3.2.conv2"], 1) == Axis(tuple(terms), 0)
    outer = next(s for s in channels.group("layer2.0.conv2").slots if s.target == "layer3.2.conv2" and s.role == "out")
    assert outer.index.ravel().tolist() == [*range(16, 24), *range(40, 48)]  # 8 zero channels before, 8 behind


def test_depthwise_ties_output_to_input_with_its_multiplier():
    _, channels = found(nn.Conv2d(8, 16, 3, padding=1, groups=8), c_out=16)
    (group,) = channels.groups
    by_target = {(s.target, s.role): s.index for s in group.slots}
    assert by_target["part", "channel"].tolist() == [[2 * i, 2 * i + 1] for i in range(8)]
    assert by_target["last", "in"].shape == (8, 2)


def test_grouped_convolutions_lose_equally_many_channels_in_every_group():
    _, channels = found(nn.Conv2d(8, 12, 3, padding=1, groups=2), c_out=12)
    assert [(g.name, g.size) for g in channels.groups] == [("first", 4), ("part", 6)]
    assert channels.group("first").slots[0].index.tolist() == [[i, i + 4] for i in range(4)]
    assert channels.group("part").slots[0].index.tolist() == [[i, i + 6] for i in range(6)]


def test_transposed_convolutions_have_their_channels_the_other_way_round():
    _, channels = found(nn.ConvTranspose2d(8, 6, 2, 2), c_out=6)
    assert [(g.name, g.size, [(s.target, s.role) for s in g.slots]) for g in channels.groups] == [
        ("first", 8, [("first", "out"), ("part", "in")]),
        ("part", 6, [("part", "out"), ("last", "in")]),
    ]


def test_a_channel_shuffle_prunes_in_pairs():
    _, channels = found(Shuffle(2))
    (group,) = channels.groups
    assert group.size == 4
    assert group.slots[0].index.tolist() == [[i, i + 4] for i in range(4)]
    assert group.slots[1].index.tolist() == [[2 * i, 2 * i + 1] for i in range(4)]


def test_split_pieces_that_are_used_differently_are_different_groups():
    _, channels = found(Split(8, 2))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 4), ("first#2", 4), ("part.convs.0.0", 4)]
    assert channels.group("first#2").slots[0].index.ravel().tolist() == [4, 5, 6, 7]


def test_a_module_called_twice_has_one_label_per_channel():
    _, channels = found(Twice(8))
    (group,) = channels.groups
    assert {(s.target, s.role) for s in group.slots} == {
        ("first", "out"), ("part.conv", "in"), ("part.conv", "out"), ("part.norm", "channel"), ("last", "in")
    }  # fmt: skip


def test_flatten_to_linear_gives_every_channel_height_times_width_inputs():
    network = lift(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 7), nn.Linear(7, 2)).eval(),
                   [(1, 3, 8, 8)])  # fmt: skip
    channels = analyse(network)
    assert [(g.name, g.size) for g in channels.groups] == [("0", 4), ("2", 7)]
    linear = channels.group("0").slots[1]
    assert (linear.target, linear.role, linear.dim) == ("2", "in", 1)
    assert np.array_equal(linear.index, np.arange(4 * 36).reshape(4, 36))
    flat = next(n.args[0].name for n in network.module.graph.nodes if n.target == "2")
    assert channels.axis(flat, 1) == Axis(((0, 36),), 0)


def test_unflattening_a_linear_keeps_the_channels():
    part = nn.Sequential(nn.Flatten(), nn.Linear(8 * 256, 6 * 64), nn.Unflatten(1, (6, 8, 8)))
    _, channels = found(part, c_out=6)
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8), ("part.1", 6)]
    assert channels.group("part.1").slots[0].index.shape == (6, 64)


def test_bare_parameters_are_slots():
    _, channels = found(ChannelsLastNorm(8))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8), ("part.up", 24)]
    params = {(s.target, s.dim) for g in channels.groups for s in g.slots if s.role == "param"}
    assert params == {("part.norm.weight", 0), ("part.norm.bias", 0), ("part.gamma", 0)}


def test_group_norm_couples_groups_and_instance_norm_nothing():
    _, channels = found(nn.GroupNorm(4, 8))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 2)]
    _, channels = found(nn.GroupNorm(8, 8))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8)]
    _, channels = found(nn.GroupNorm(1, 8))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8)]


def test_pixel_shuffle_prunes_whole_pixels():
    _, channels = found(nn.PixelShuffle(2), c_out=2)
    (group,) = channels.groups
    assert group.slots[0].index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    _, channels = found(SpaceToDepth(), c_out=32)
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8)]
    assert channels.groups[0].slots[1].index.shape == (8, 4)


@pytest.mark.parametrize(
    ("function", "unknown"),
    [
        (lambda x: torch.cumsum(x, 1), ()),
        (lambda x: x.softmax(1), ()),
        (lambda x: x - x.mean(1, keepdim=True), ()),
        (lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).view(x.shape) + x, ()),
        (lambda x: torch.roll(x, 1, 1), ()),
        (lambda x: x.flip(1), ()),
        (lambda x: F.pad(x.transpose(1, 3), (1, 1, 0, 0), mode="reflect")[..., 1:-1].transpose(1, 3), ()),
        (lambda x: torch.fft.fft(x).real, ("fft_fft",)),
    ],
)  # fmt: skip
def test_what_is_not_understood_freezes_what_it_touches(function, unknown):
    _, channels = found(Function(function))
    assert channels.groups == ()
    assert [u for u in channels.unknown_ops if u in unknown] == list(unknown)


def test_softmax_over_space_does_not_freeze_channels():
    _, channels = found(Function(lambda x: x * x.flatten(2).softmax(-1).view(x.shape)))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8)]


def test_a_computed_weight_freezes_what_it_touches():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight * torch.sigmoid(x.mean())  # depends on the input: cannot be folded
            return F.conv2d(x, weight, self.bias, padding=1)

    _, channels = found(Standardised(8, 8, 3))
    assert channels.groups == ()


def test_several_outputs_are_all_frozen():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.a(x), [self.b(x)][0]

    channels = analyse(lift(Heads().eval(), [(1, 3, 16, 16)]))
    assert [(g.name, g.size) for g in channels.groups] == [("stem", 8)]


def test_a_constant_follows_what_it_meets():
    """Zeros that are concatenated are channels; the tensor that lends them its type keeps its own."""
    _, channels = found(Function(lambda x: torch.cat([x, x.new_zeros(x.shape[0], 4, 16, 16)], 1)), c_out=12)
    assert (channels.groups[0].name, channels.groups[0].size) == ("first", 8)
    constants = channels.groups[1]
    assert [(s.target, s.role, s.index.ravel().tolist()) for s in constants.slots] == [("last", "in", [8, 9, 10, 11])]


def test_a_sum_over_channels_lets_them_go_and_a_mean_does_not():
    _, channels = found(Function(lambda x: x.sum(1, keepdim=True).expand(-1, 8, -1, -1)))
    assert [(g.name, g.size) for g in channels.groups] == [("first", 8)]
    _, channels = found(Function(lambda x: x.mean(1, keepdim=True).expand(-1, 8, -1, -1)))
    assert channels.groups == ()


@pytest.mark.parametrize("units", [[], [8], [-1], [1, 1]])
def test_a_bad_selection_is_refused(units):
    _, channels = found(nn.ReLU())
    with pytest.raises(UsageError, match="'first'"):
        channels.removed({"first": units})


def test_an_unknown_group_is_refused():
    _, channels = found(nn.ReLU())
    with pytest.raises(UsageError, match="nonesuch"):
        channels.removed({"nonesuch": [0]})


def test_units_of_a_group_are_interchangeable():
    """Cutting any k units of a group gives the same shapes; cutting all but different ones gives different outputs."""
    from edgeprune.graph.surgery import cut

    network, channels = found(nn.Sequential(Concat(8, 4), Split(12, 2)), c_out=12)
    inputs = network.random_inputs(2)
    for group in channels.groups:
        first = cut(network, channels, {group.name: range(1)}).module
        last = cut(network, channels, {group.name: [group.size - 1]}).module
        assert [p.shape for p in first.parameters()] == [p.shape for p in last.parameters()]
        with torch.no_grad():
            assert relative_error(first(*inputs), last(*inputs)) > 1e-3
