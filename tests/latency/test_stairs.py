import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import conv, table_of

from edgeprune.errors import TableError
from edgeprune.latency.predict import LatencyModel
from edgeprune.latency.stairs import Span, edges, lattice, lattice_rows, line_counts, line_rows, wanted_rows


def stairs_ms(kernel):
    """Blocks of 16 on both sides; input counts that are no multiple of 4 cost more than all."""
    c_in, c_out = kernel.inputs[0][1], kernel.output[1]
    penalty = 1.6 if c_in % 4 else 1.0
    return penalty * (0.02 + 1e-5 * math.ceil(c_in / 16) * 16 * math.ceil(c_out / 16) * 16)


def span_of(c_in=64, c_out=96):
    return Span("conv", lambda counts: conv(*counts), (c_in, c_out))


def measured(path, span):
    return LatencyModel(table_of(path, line_rows([span]), stairs_ms))


def test_edges_are_the_right_ends(tmp_path):
    span = span_of()
    model = measured(tmp_path, span)
    assert edges(model, span, 0, range(1, 65)) == [16, 32, 48, 64]
    assert edges(model, span, 1, range(1, 97)) == [16, 32, 48, 64, 80, 96]


def test_full_count_is_an_edge_though_it_is_off_the_stairs(tmp_path):
    span = span_of(60, 90)
    model = measured(tmp_path, span)
    assert edges(model, span, 1, range(1, 91)) == [16, 32, 48, 64, 80, 90]
    assert edges(model, span, 0, range(1, 61)) == [16, 32, 48, 60]


def test_equal_within_noise_is_equal(tmp_path):
    span = Span("conv", lambda counts: conv(64, *counts), (32,))
    kernels = line_rows([span])
    model = LatencyModel(table_of(tmp_path, kernels, lambda k: 0.1 - 0.0005 * (k.output[1] % 2)))
    assert edges(model, span, 0, range(1, 33)) == [32]


def test_a_full_count_without_price_is_an_error(tmp_path):
    span = span_of()
    model = LatencyModel(table_of(tmp_path, [conv(16, 16)], stairs_ms))
    with pytest.raises(TableError):
        edges(model, span, 0, range(1, 65))


@settings(max_examples=30, deadline=None)
@given(times=st.lists(st.floats(0.01, 1.0), min_size=20, max_size=20))
def test_no_edge_has_a_larger_faster_count(times, tmp_path_factory):
    span = Span("conv", lambda counts: conv(64, *counts), (20,))
    kernels = [span.at((c,)) for c in range(1, 21)]
    by_kernel = dict(zip(kernels, times, strict=True))
    model = LatencyModel(table_of(tmp_path_factory.mktemp("t"), kernels, by_kernel.__getitem__))
    found = edges(model, span, 0, range(1, 21))
    assert found[-1] == 20
    for edge in found:
        assert all(times[larger - 1] > times[edge - 1] for larger in range(edge + 1, 21))
    for count in set(range(1, 21)) - set(found):  # every other count has a wider one that is as fast
        assert any(times[larger - 1] <= times[count - 1] * 1.011 for larger in range(count + 1, 21))


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
    more = table_of(tmp_path / "more", lattice_rows(model, [span]), stairs_ms)
    model.table.append(list(more.rows.values()))
    steps_in, steps_out = range(16, 257, 16), range(16, 513, 16)
    assert model.missing([conv(x, y) for x in steps_in for y in steps_out]) == []
    for x, y in ((48, 208), (240, 368)):
        assert model.predict(conv(x, y)).ms == pytest.approx(stairs_ms(conv(x, y)), rel=0.01)


def test_wanted_rows_are_lines_then_lattices(tmp_path):
    spans = [span_of(), span_of(), Span("fixed", lambda counts: conv(3, 16), ())]
    lines = wanted_rows(spans)
    assert len(lines) == len(set(lines))
    assert conv(3, 16) in lines
    model = LatencyModel(table_of(tmp_path, lines, stairs_ms))
    assert set(wanted_rows(spans, model)) - set(lines)


def test_low_counts_are_kept_out():
    span = Span("conv", lambda counts: conv(*counts), (64, 64), (16, 32))
    kernels = line_rows([span])
    assert min(k.inputs[0][1] for k in kernels) == 16
    assert min(k.output[1] for k in kernels) == 32
