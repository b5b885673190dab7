import itertools

import numpy as np
import onnx_nets as nets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import FINGERPRINT, REF_MS, conv, row, table_of

from edgeprune.errors import TableError
from edgeprune.latency.calibrate import Calibration, fit_samples, network_key
from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.predict import LatencyModel
from edgeprune.latency.table import LatencyTable, Measurement, NetworkRow


def bilinear(kernel: Kernel) -> float:
    c_in, c_out = kernel.inputs[0][1], kernel.output[1]
    return 0.01 + 1e-4 * c_in + 2e-4 * c_out + 3e-6 * c_in * c_out


def grid(xs, ys):
    return [conv(x, y) for x, y in itertools.product(xs, ys)]


def test_exact_rows_come_first(tmp_path):
    model = LatencyModel(table_of(tmp_path, grid((32, 64), (32, 64)), bilinear))
    prediction = model.predict(conv(32, 64))
    assert prediction.source == "measured"
    assert prediction.ms == pytest.approx(bilinear(conv(32, 64)), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(x=st.integers(2, 16), y=st.integers(2, 16), classes=st.sampled_from([(0, 0), (0, 4), (8, 3), (1, 1)]))
def test_bilinear_work_is_met_exactly(x, y, classes, tmp_path_factory):
    a, b = classes
    table = table_of(tmp_path_factory.mktemp("t"), grid((32 + a, 64 + a, 256 + a), (32 + b, 80 + b, 256 + b)), bilinear)
    kernel = conv(16 * x + a, 16 * y + b)
    prediction = LatencyModel(table).predict(kernel)
    assert prediction.ms == pytest.approx(bilinear(kernel), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(x=st.integers(33, 255), y=st.integers(33, 255))
def test_never_across_classes(x, y, tmp_path_factory):
    model = LatencyModel(table_of(tmp_path_factory.mktemp("t"), grid((32, 256), (32, 256)), bilinear))
    kernel = conv(x, y)
    if x % 16 == 0 and y % 16 == 0:
        assert model.predict(kernel).source == "interpolated"
        assert model.missing([kernel]) == []
    else:
        with pytest.raises(TableError, match="has no row"):
            model.predict(kernel)
        assert model.missing([kernel, kernel]) == [kernel]


@pytest.mark.parametrize("kernel", [conv(16, 64), conv(272, 64), conv(64, 272), conv(64, 64, 14)])
def test_never_beyond_the_rows(kernel, tmp_path):
    model = LatencyModel(table_of(tmp_path, grid((32, 256), (32, 256)), bilinear))
    with pytest.raises(TableError) as error:
        model.predict(kernel)
    assert kernel.key() in str(error.value)


def test_small_counts_do_not_mix_with_large(tmp_path):
    model = LatencyModel(table_of(tmp_path, grid((8, 40), (32, 64)), bilinear))
    with pytest.raises(TableError):
        model.predict(conv(24, 48))


@settings(max_examples=40, deadline=None)
@given(points=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=25), data=st.data())
def test_interpolation_stays_between_its_corners(points, data, tmp_path_factory):
    kernels = sorted({conv(16 * x, 16 * y) for x, y in points})
    times = {k: data.draw(st.floats(0.01, 1.0)) for k in kernels}
    model = LatencyModel(table_of(tmp_path_factory.mktemp("t"), kernels, times.__getitem__))
    for x, y in itertools.product(range(1, 9), repeat=2):
        kernel = conv(16 * x, 16 * y)
        try:
            prediction = model.predict(kernel)
        except TableError:
            assert kernel not in times
            continue
        assert min(times.values()) * 0.9999 <= prediction.ms <= max(times.values()) * 1.0001
        if kernel in times:
            assert prediction.source == "measured"


def test_one_sided_kernels_go_by_their_size(tmp_path):
    pools = [Kernel("MaxPool", (), ((1, c, 28, 28),), (1, c, 14, 14)) for c in (32, 64, 96)]
    model = LatencyModel(table_of(tmp_path, [pools[0], pools[2]], lambda k: 1e-3 * k.output[1]))
    assert model.predict(pools[1]).ms == pytest.approx(0.064)


def test_last_axis_is_a_channel_axis_too(tmp_path):
    norms = [Kernel("LayerNormalization", (), ((1, 7, 7, c),), (1, 7, 7, c)) for c in (32, 64, 96)]
    model = LatencyModel(table_of(tmp_path, [norms[0], norms[2]], lambda k: 1e-3 * k.output[3]))
    assert model.predict(norms[1]).ms == pytest.approx(0.064)


def test_rows_added_later_are_seen(tmp_path):
    table = table_of(tmp_path, grid((32, 256), (32,)), bilinear)
    model = LatencyModel(table)
    with pytest.raises(TableError):
        model.predict(conv(64, 64))
    table.append([row(k, bilinear(k)) for k in grid((32, 256), (256,))])
    assert model.predict(conv(64, 64)).ms == pytest.approx(bilinear(conv(64, 64)), rel=1e-5)


def test_failed_kernels_have_no_price(tmp_path):
    table = table_of(tmp_path, grid((32,), (32,)), bilinear)
    table.append([Measurement(conv(64, 64).key(), error="refused")])
    with pytest.raises(TableError, match="could not be measured on cpu: refused"):
        LatencyModel(table).predict(conv(64, 64))


def test_network_is_prices_plus_constant(tmp_path):
    parts = sites(nets.resnet())
    kernels = [site.kernel for site in parts]
    table = table_of(tmp_path, list(dict.fromkeys(kernels)), lambda k: 0.05)
    model = LatencyModel(table)
    assert model.network(parts) == pytest.approx(0.05 * len(kernels))
    keys = tuple(k.key() for k in kernels)
    table.append([NetworkRow(network_key(keys), keys, ratio=0.06 * len(kernels) / 8 / REF_MS)])
    model.place(kernels)
    total = sum(model.price(k) for k in kernels) + model.constant_ms
    assert model.network(parts) == pytest.approx(total)
    assert model.network(parts) == pytest.approx(0.06 * len(kernels), rel=0.02)
    assert model.network(nets.resnet()) == pytest.approx(total)


def test_networks_of_like_build_decide(tmp_path):
    small, large = sites(nets.resnet()), sites(nets.inverted_residual())
    kernels = {s.kernel for s in (*small, *large)}
    table = table_of(tmp_path, sorted(kernels), lambda k: 0.05)
    for parts, factor in ((small, 1.2), (large, 0.9)):
        keys = tuple(s.kernel.key() for s in parts)
        table.append([NetworkRow(network_key(keys), keys, factor * 0.05 * len(keys) / 8 / REF_MS)])
    model = LatencyModel(table)
    assert model.network(small) == pytest.approx(1.2 * 0.05 * len(small), rel=0.02)
    assert model.network(large) == pytest.approx(0.9 * 0.05 * len(large), rel=0.02)


def test_a_kernel_without_price_is_never_zero(tmp_path):
    parts = sites(nets.resnet())
    table = table_of(tmp_path, [parts[0].kernel], lambda k: 0.05)
    with pytest.raises(TableError, match="has no row"):
        LatencyModel(table).network(parts)


def test_no_networks_means_the_plain_sum():
    empty = fit_samples(*[np.zeros(0)] * 3)
    assert empty == Calibration()
    assert empty.apply(3.0, 10) == 3.0


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.8, 1.3), per_kernel=st.floats(0, 0.004), constant=st.floats(0, 0.02), seed=st.integers(0, 99))
def test_calibration_finds_what_was_put_in(scale, per_kernel, constant, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, 120, 30).astype(float)
    sums = counts * rng.uniform(0.01, 0.2, 30)
    times = scale * sums + per_kernel * counts + constant
    times[0] *= 1.5  # one measurement disturbed
    found = fit_samples(sums, counts, times)
    told = found.scale * sums + found.per_kernel_ms * counts + found.constant_ms
    error = np.abs(told / times - 1)[1:]
    assert np.median(error) < 0.01
    assert min(found.scale, found.per_kernel_ms, found.constant_ms) >= 0


def test_table_of_another_device_has_no_rows(tmp_path):
    assert LatencyTable(tmp_path / "x.jsonl", FINGERPRINT).rows == {}
