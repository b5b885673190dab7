import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import conv, table_of

from edgeprune.latency.predict import LatencyModel
from edgeprune.latency.stairs import lattice, line_counts, line_rows


@dataclass
class Span:
    name: str
    at: object
    full: tuple
    low: tuple = ()


def stairs_ms(kernel):
    """Blocks of 16 on both sides; input counts that are no multiple of 4 cost more than all."""
    c_in, c_out = kernel.inputs[0][1], kernel.output[1]
    penalty = 1.6 if c_in % 4 else 1.0
    return penalty * (0.02 + 1e-5 * math.ceil(c_in / 16) * 16 * math.ceil(c_out / 16) * 16)


def span_of(c_in=64, c_out=96):
    return Span("conv", lambda counts: conv(*counts), (c_in, c_out))


def measured(path, span):
    return LatencyModel(table_of(path, line_rows([span]), stairs_ms))


@given(full=st.integers(1, 2100), low=st.integers(1, 8))
def test_lines_hold_the_ends_and_the_start(full, low):
    counts = line_counts(full, min(low, full))
    assert counts[-1] == full
    assert counts[0] >= min(low, full)
    fine = range(min(low, full), min(full, 32) + 1)
    assert {c for c in fine if c % 4 == 0 or full <= 64} <= set(counts)
    assert len(counts) <= 70
    assert counts == sorted(set(counts))


@given(st.sets(st.integers(1, 600), min_size=1, max_size=80), st.integers(2, 8))
def test_lattice_keeps_the_ends_of_every_class(counts, limit):
    chosen = lattice(counts, limit)
    assert set(chosen) <= counts
    classes = {}
    for count in counts:
        classes.setdefault((count % 16, count < 16), []).append(count)
    for members in classes.values():
        kept = [c for c in chosen if c in members]
        assert {min(members), max(members)} <= set(kept)
        assert len(kept) <= max(2, limit)


def test_lattices_price_every_pair_of_edges(tmp_path):
    span = span_of(256, 512)
    model = measured(tmp_path, span)
    pairs = itertools.product(lattice(range(16, 257, 16)), lattice(range(16, 513, 16)))
    more = table_of(tmp_path / "more", [span.at(pair) for pair in pairs], stairs_ms)
    model.table.append(list(more.rows.values()))
    steps_in, steps_out = range(16, 257, 16), range(16, 513, 16)
    assert model.missing([conv(x, y) for x in steps_in for y in steps_out]) == []
    for x, y in ((48, 208), (240, 368)):
        assert model.predict(conv(x, y)).ms == pytest.approx(stairs_ms(conv(x, y)), rel=0.01)


def test_low_counts_are_kept_out():
    span = Span("conv", lambda counts: conv(*counts), (64, 64), (16, 32))
    kernels = line_rows([span])
    assert min(k.inputs[0][1] for k in kernels) == 16
    assert min(k.output[1] for k in kernels) == 32
