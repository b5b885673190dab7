"""A table is held to what its device does now: the same device agrees, a table that tells other times does not."""

import dataclasses
import json

import pytest
from tables import conv

from edgeprune.device.connect import connect
from edgeprune.device.target import Protocol, Target
from edgeprune.errors import TableError
from edgeprune.latency import recheck as module
from edgeprune.latency.recheck import recheck
from edgeprune.latency.sweep import profile
from edgeprune.latency.table import LatencyTable, Measurement

QUICK = Target("cpu", protocol=Protocol(warmup_ms=1, kernel_ms=3, evict_mb=1, batch_ms=0.5))
KERNELS = [conv(c, d, 12) for c in (16, 32, 48, 64) for d in (16, 32, 48, 64)]


@pytest.fixture(scope="module")
def device():
    with connect(QUICK) as opened:
        yield opened


@pytest.fixture(scope="module")
def table(device, tmp_path_factory):
    made = LatencyTable(tmp_path_factory.mktemp("table") / "table.jsonl", device.fingerprint)
    profile(device, made, KERNELS)
    return made


def rewritten(table, path, change):
    """The table with every kernel's row changed."""
    lines = [json.loads(line) for line in table.path.read_text().splitlines()]
    lines = [change(dict(line)) if line.get("kind") == "kernel" else line for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return LatencyTable(path, table.fingerprint)


def test_measures_kernels_of_all_sizes_and_writes_nothing(device, table):
    before = table.path.read_bytes()
    seen = []
    found = recheck(device, table, kernels=6, progress=lambda done, total: seen.append((done, total)))
    assert found.kernels == 6
    assert seen[-1] == (6, 6)
    assert 0 < found.low <= found.middle <= found.high
    assert 0.2 < found.speed < 5
    assert table.path.read_bytes() == before
    assert "6 kernels" in found.text()


def test_a_table_of_other_times_is_found_out(device, table, tmp_path, monkeypatch):
    """Every kernel written down at a third of its time, the references as they were."""
    monkeypatch.setattr(module, "MIDDLE", 0.4)  # a busy machine may be off by much, but not by three
    monkeypatch.setattr(module, "EACH", 0.9)

    def third(line):
        return {**line, "hot_ms": line["hot_ms"] / 3, "cold_ms": line["cold_ms"] / 3}

    found = recheck(device, rewritten(table, tmp_path / "other.jsonl", third))
    assert found.middle > 1.8
    assert not found.holds
    assert "no longer true" in found.text()
    assert len(found.furthest) == 3


def test_what_holds_is_what_lies_within_both_limits(table, monkeypatch):
    """The rows of the table itself stand for the new ones, kernel by kernel told slower by a known factor."""
    shares = {}

    def copied(device, fresh, kernels, progress):
        rows = []
        for kernel in kernels:
            row = table.rows[kernel.key()]
            share = shares.get(kernel.key(), 1.0)
            rows.append(dataclasses.replace(row, hot_ms=row.hot_ms * share, cold_ms=row.cold_ms * share))
        fresh.append([*table.overheads.values(), *rows])

    monkeypatch.setattr(module, "profile", copied)
    same = recheck(None, table)
    assert same.holds
    assert same.kernels == len(KERNELS)
    shares.update({kernel.key(): 1.5 for kernel in KERNELS[:4]})
    some = recheck(None, table)
    assert abs(some.middle - 1) < 0.05
    assert some.high > 1.3
    assert not some.holds
    assert {key for key, _, _ in some.furthest} <= set(shares)


def test_an_empty_table_and_one_of_failures_say_what_to_do(device, tmp_path):
    empty = LatencyTable(tmp_path / "empty.jsonl", device.fingerprint)
    with pytest.raises(TableError, match="edgeprune profile --target cpu"):
        recheck(device, empty)
    empty.append([Measurement(KERNELS[0].key(), error="refused")])
    with pytest.raises(TableError, match="edgeprune profile --target cpu"):
        recheck(device, empty)
