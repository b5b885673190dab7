"""The operator table: every name exists, has one kind, and the odd ones are told apart."""

import operator

import pytest
import torch
from torch import fx

from edgeprune.graph.ops import TABLE, Kind, arguments, kind_of, name_of, set_argument

aten = torch.ops.aten


@pytest.mark.parametrize("kind", list(TABLE))
def test_every_operator_in_the_table_exists(kind):
    aside = {"max_other", "min_other"}  # spelt by overload, see kind_of
    missing = [n for n in TABLE[kind].split() if n not in aside and not hasattr(aten, n)]
    assert missing == []


def test_no_operator_has_two_kinds():
    names = [name for row in TABLE.values() for name in row.split()]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (aten.add.Tensor, Kind.ELEMENTWISE),
        (aten.add.Scalar, Kind.ELEMENTWISE),
        (aten.max.other, Kind.ELEMENTWISE),
        (aten.max.dim, Kind.REDUCTION),
        (aten.mean.dim, Kind.REDUCTION),
        (aten.view.default, Kind.STRUCTURAL),
        (aten.group_norm.default, Kind.CHANNELWISE),
        (aten.adaptive_avg_pool2d.default, Kind.POOLING),
        (aten.upsample_bilinear2d.vec, Kind.POOLING),
        (aten.softmax.int, Kind.ALONG),
        (aten.zeros.default, Kind.FACTORY),
        (aten.matmul.default, Kind.MIXING),
        (aten.sym_size.int, Kind.SIZE),
        (operator.floordiv, Kind.SIZE),
        (aten.grid_sampler.default, None),
        (aten.as_strided.default, None),
    ],
)
def test_kind(target, kind):
    assert kind_of(target) is kind


def test_an_operator_of_another_library_is_unknown_and_named_in_full():
    with torch.library._scoped_library("edgeprune_test", "DEF") as library:
        library.define("relu(Tensor x) -> Tensor")
        target = torch.ops.edgeprune_test.relu.default
        assert name_of(target) == "edgeprune_test.relu"
        assert kind_of(target) is None


def test_arguments_are_found_by_name_and_replaced_wherever_they_stand():
    graph = fx.Graph()
    x = graph.placeholder("x")
    short = graph.call_function(aten.slice.Tensor, (x, 1))
    long = graph.call_function(aten.slice.Tensor, (x, 1, 2, 5))
    named = graph.call_function(aten.slice.Tensor, (x,), {"dim": 1, "start": 2, "end": 5})
    assert arguments(short) == {"self": x, "dim": 1, "start": None, "end": None, "step": 1}
    value = torch.arange(20).reshape(2, 10)
    for node in (short, long, named):
        set_argument(node, "start", 3)
        set_argument(node, "end", 4)
        call = {**arguments(node), "self": value}
        assert torch.equal(node.target(**call), value[:, 3:4])
        assert torch.equal(node.target(value, *node.args[1:], **node.kwargs), value[:, 3:4])
