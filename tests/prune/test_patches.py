"""Sampled rows times packed weights must be the layer's own output at those places."""

import pytest
import torch
from torch import nn

from edgeprune.prune.patches import Positions, channel_dim, output_places, pack, rows_at, unpack, values_at

LAYERS = {
    "3x3": (nn.Conv2d(4, 6, 3, padding=1), (4, 9, 7)),
    "stride and dilation": (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (4, 11, 10)),
    "no bias, asymmetric": (nn.Conv2d(4, 6, (1, 5), padding=(0, 2), bias=False), (4, 6, 8)),
    "even, valid": (nn.Conv2d(4, 6, 2), (4, 6, 8)),
    "same": (nn.Conv2d(4, 6, 4, padding="same"), (4, 6, 8)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 6, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 8)),
    "1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (4, 12)),
    "3d": (nn.Conv3d(2, 3, 3, padding=1), (2, 4, 5, 3)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear on tokens": (nn.Linear(5, 3), (7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_weight_is_the_output(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(10, *shape)
    parts = list(x.split(4))
    with torch.no_grad():
        y = layer(x)
        dim = channel_dim(layer)
        places = tuple(int(s) for d, s in enumerate(y.shape) if d not in (0, dim % y.dim()))
        assert output_places(layer, x) == places
        where = Positions(3).pick(10, places, 60)
        expected = values_at(list(y.split(4)), dim, where)
        rows, packed = rows_at(layer, parts, where), pack(layer)
        got = rows @ packed
        if got.dim() == 3:
            got = got.transpose(0, 1).flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight, bias = unpack(layer, packed)
    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias if layer.bias is not None else torch.zeros(len(weight)))


def test_positions_are_the_same_for_the_same_question_and_nested():
    a, b = Positions(0), Positions(0)
    for u, v in zip(a.pick(5, (8, 8), 100), b.pick(5, (8, 8), 100), strict=True):
        assert torch.equal(u, v)
    few, many = a.pick(5, (8, 8), 50), a.pick(5, (8, 8), 100)
    places = {tuple(t) for t in torch.stack(many, 1).tolist()}
    assert {tuple(t) for t in torch.stack(few, 1).tolist()} <= places
    assert len(places) == len(many[0]) == 100  # none twice


def test_fewer_rows_than_images_take_some_images_only():
    image, y, x = Positions(0).pick(100, (4, 4), 30)
    assert len(image) == len(y) == len(x) == 30
    assert len(set(image.tolist())) == 30


def test_no_more_rows_than_there_are():
    image, y, x = Positions(0).pick(3, (2, 2), 1000)
    assert len({*zip(image.tolist(), y.tolist(), x.tolist(), strict=True)}) == 12 == len(image)
