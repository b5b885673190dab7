"""cut == masked original over real architectures: a handful in the fast tests, all of them with --slow."""

import time

import pytest
import torch
from families import FAMILIES, Family
from support import allow_torchvision, cut_error, filter_share, random_keep, relative_error

from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.lift import lift
from edgeprune.graph.surgery import cut, remove

pytest.importorskip("timm" if allow_torchvision() else "torchvision")


@pytest.mark.parametrize(
    "family", [pytest.param(f, id=f.model, marks=[] if f.fast else [pytest.mark.slow]) for f in FAMILIES]
)
def test_family(family: Family):
    network = lift(family.build(), [(1, 3, family.size, family.size)])
    start = time.perf_counter()
    channels = analyse(network)
    assert time.perf_counter() - start < 20, "five seconds are allowed on an idle machine"
    assert filter_share(network, channels) >= family.share - 0.01
    keep = random_keep(channels, 0)
    assert cut_error(network, channels, keep) <= 1e-5

    small, blocks, inputs = cut(network, channels, keep), find_blocks(network), network.random_inputs(2)
    with torch.no_grad():
        whole = network.module(*inputs)
        assert relative_error(small.module(*inputs), whole) > 1e-2
        shallow = remove(small, blocks).module(*inputs)
    assert shallow.shape == whole.shape
    assert shallow.isfinite().all()
