import numpy as np
import onnx_nets as nets
import pytest
from tables import REF_MS, conv, table_of

from edgeprune.device.connect import connect
from edgeprune.device.target import Protocol, Target
from edgeprune.errors import DeviceError
from edgeprune.latency.calibrate import calibrate, network_key
from edgeprune.latency.fusion import sites
from edgeprune.latency.networks import REFERENCE_CONVS, REFERENCE_NAME, measure_networks
from edgeprune.latency.table import LatencyTable

QUICK = Target("cpu", protocol=Protocol(warmup_ms=1, rounds=6, round_ms=2, kernel_ms=2, evict_mb=1))


@pytest.fixture(scope="module")
def device():
    with connect(QUICK) as opened:
        yield opened


def test_networks_side_by_side(device, tmp_path):
    small, large = nets.resnet(16).SerializeToString(), nets.resnet(96).SerializeToString()
    timings = measure_networks(device, {"small": small, "large": large})
    assert set(timings.networks) == {"small", "large"}
    for timing in timings.networks.values():
        assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms
        assert timing.median_ms <= timing.p90_ms * 1.0001
        assert timing.samples >= 6
        assert 0 <= timing.interrupted <= 1
    assert {len(rounds) for rounds in timings.rounds.values()} == {6}
    assert REFERENCE_NAME in timings.rounds
    ratio = timings.ratio("large", "small")
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value > 2  # thirty times the work
    assert timings.ratio("small", "small").value == 1
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    timing = timings.networks["large"]
    assert timing.normal_ms(table) == pytest.approx(timing.reference.value * REFERENCE_CONVS * REF_MS)


def test_more_rounds_can_be_asked(device):
    timings = measure_networks(device, {"a": nets.resnet(16).SerializeToString()}, rounds=9)
    assert len(timings.rounds["a"]) == 9
    assert np.all(timings.rounds["a"] > 0)


def test_a_refused_network_is_a_device_error(device):
    with pytest.raises(DeviceError, match="cannot run the networks"):
        measure_networks(device, {"bad": b"no model"})


def test_calibration_networks_are_stored(device, tmp_path):
    model = nets.resnet(16)
    keys = [site.kernel.key() for site in sites(model)]
    table = LatencyTable(tmp_path / "table.jsonl", device.fingerprint)
    calibrate(device, table, {"a": model.SerializeToString()}, {"a": keys})
    again = LatencyTable(table.path, device.fingerprint)
    assert again.networks == table.networks
    assert again.networks[network_key(keys)].keys == tuple(keys)
    assert again.networks[network_key(keys)].ratio > 0
