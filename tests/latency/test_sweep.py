"""Sweeps on the real runtime: what is missing is measured once, failures are rows, and kill -9 loses nothing."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from tables import FINGERPRINT, conv, row

from edgeprune.device.connect import connect
from edgeprune.device.device import AgentStartError, DeviceLostError
from edgeprune.device.target import Protocol, Target
from edgeprune.errors import TableError
from edgeprune.latency import sweep
from edgeprune.latency.kernel import Kernel
from edgeprune.latency.table import LatencyTable

QUICK = Target("cpu", protocol=Protocol(warmup_ms=1, kernel_ms=1, evict_mb=1, batch_ms=0.2))
KERNELS = [conv(c, 16, 8) for c in range(1, 41)]
MANY = [conv(c, d, 8) for d in (8, 16, 24, 32) for c in range(1, 41)]
UNKNOWN = Kernel("NoSuchOperator", (), ((1, 4),), (1, 4))
REFUSED = Kernel("Reshape", (), ((1, 4),), (1, 5))  # the runtime refuses to load it


@pytest.fixture(scope="module")
def device():
    with connect(QUICK) as opened:
        yield opened


@pytest.fixture
def table(device, tmp_path):
    return LatencyTable(tmp_path / "table.jsonl", device.fingerprint)


def keys_in(path: Path) -> Counter:
    documents = [json.loads(line) for line in path.read_bytes().splitlines()]
    return Counter(d["key"] for d in documents if d.get("kind") == "kernel")


def test_the_second_time_nothing_is_measured(device, table):
    seen = []
    stats = sweep.profile(device, table, KERNELS[:12] * 2, lambda done, total: seen.append((done, total)))
    assert (stats.known, stats.measured, stats.failed) == (0, 12, 0)
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    size = table.path.stat().st_size
    again = sweep.profile(device, LatencyTable(table.path, device.fingerprint), KERNELS[:12])
    assert (again.known, again.measured, again.batches) == (12, 0, 0)
    assert table.path.stat().st_size == size


def test_kernels_at_fault_get_a_row_and_spare_the_others(device, table):
    kernels = [*KERNELS[:3], UNKNOWN, KERNELS[3], REFUSED, *KERNELS[4:7]]
    stats = sweep.profile(device, table, kernels)
    assert (stats.measured, stats.failed) == (7, 2)
    assert {key for key, found in table.rows.items() if found.error} == {UNKNOWN.key(), REFUSED.key()}
    with pytest.raises(TableError, match="NoSuchOperator.*could not be measured"):
        table.ms(UNKNOWN.key())
    assert sweep.profile(device, table, kernels).batches == 0


def test_a_crashing_kernel_costs_one_row(device, table, monkeypatch):
    culprit = KERNELS[5]

    def measure(device, kernels, expected_ms=0):
        if culprit in kernels:
            raise DeviceLostError("the agent ended without an answer")
        return [row(kernel, 0.1) for kernel in kernels]

    monkeypatch.setattr(sweep, "measure_batch", measure)
    stats = sweep.profile(device, table, KERNELS)
    assert (stats.measured, stats.failed) == (39, 1)
    assert "without an answer" in table.rows[culprit.key()].error


def test_a_dead_device_ends_the_sweep(device, table, monkeypatch):
    def measure(device, kernels, expected_ms=0):
        raise DeviceLostError("gone")

    monkeypatch.setattr(sweep, "measure_batch", measure)
    with pytest.raises(DeviceLostError):
        sweep.profile(device, table, KERNELS)
    assert not table.rows


def test_a_kernel_is_not_blamed_for_a_device_that_fails(device, table, monkeypatch):
    """A sick device, not a dead one: it answers now and then."""
    turns = itertools.count()

    def measure(device, kernels, expected_ms=0):
        if not kernels or next(turns) % 4:
            raise DeviceLostError("gone")
        return [row(kernel, 0.1) for kernel in kernels]

    monkeypatch.setattr(sweep, "measure_batch", measure)
    with pytest.raises(DeviceLostError):
        sweep.profile(device, table, KERNELS)
    assert not [found for found in table.rows.values() if found.error]


def test_an_agent_that_does_not_start_ends_the_sweep(device, table, monkeypatch):
    calls = []

    def measure(device, kernels, expected_ms=0):
        calls.append(kernels)
        raise AgentStartError("no memory")

    monkeypatch.setattr(sweep, "measure_batch", measure)
    with pytest.raises(AgentStartError):
        sweep.profile(device, table, KERNELS)
    assert len(calls) == 1
    assert not table.rows


def test_a_slow_batch_is_repeated_and_the_best_kept(device, table, monkeypatch):
    refs = iter([0.2, 0.5, 0.21, 0.9, 0.8, 0.7, 0.2])

    def measure(device, kernels, expected_ms):
        ref = next(refs)
        return [dataclasses.replace(row(kernel, ref), hot_ref_ms=ref, cold_ref_ms=ref) for kernel in kernels]

    monkeypatch.setattr(sweep, "measure_batch", measure)
    monkeypatch.setattr(sweep, "batches", lambda kernels, batch_ms: [[kernel] for kernel in kernels])
    stats = sweep.profile(device, table, KERNELS[:4])
    assert (stats.batches, stats.repeated) == (7, 3)
    assert sorted(table.rows[k.key()].hot_ref_ms for k in KERNELS[:4]) == [0.2, 0.2, 0.21, 0.7]


def test_another_devices_table_is_refused(device, tmp_path):
    with pytest.raises(TableError, match="belongs to another device"):
        sweep.profile(device, LatencyTable(tmp_path / "t.jsonl", FINGERPRINT), KERNELS)


def test_batches_hold_every_kernel_once_within_limits():
    kernels = [conv(c, d, 14) for c in range(16, 512, 48) for d in range(16, 512, 48)]
    made = sweep.batches(kernels, 2.0)
    assert Counter(k for batch in made for k in batch) == Counter(kernels)
    assert all(len(batch) <= sweep.BATCH_KERNELS for batch in made)
    assert all(len(batch) == 1 or sum(map(sweep.expected_ms, batch)) <= 2.0 for batch in made)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_sweep import MANY, QUICK
from edgeprune.device.connect import connect
from edgeprune.latency import sweep
from edgeprune.latency.table import LatencyTable
from pathlib import Path
with connect(QUICK) as device:
    table = LatencyTable(Path({path!r}), device.fingerprint)
    stats = sweep.profile(device, table, MANY)
"""


def test_kill_and_resume(device, tmp_path):
    path = tmp_path / "table.jsonl"
    script = SCRIPT.format(tests=str(Path(__file__).parent), path=str(path))
    survived = 0
    for _ in range(3):  # killed in the middle, three times
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and sum(keys_in_torn(path).values()) > survived:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        now = sum(keys_in_torn(path).values())
        assert survived < now < len(MANY)
        survived = now
    with path.open("ab") as file:
        file.write(b'{"kind": "kernel", "key": "torn')
    before = keys_in_torn(path)
    stats = sweep.profile(device, LatencyTable(path, device.fingerprint), MANY)
    assert stats.known == sum(before.values())
    assert keys_in(path) == Counter(kernel.key() for kernel in MANY)


def keys_in_torn(path: Path) -> Counter:
    whole = path.read_bytes()
    documents = [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
    return Counter(d["key"] for d in documents if d.get("kind") == "kernel")
