import dataclasses
import json
import multiprocessing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import FINGERPRINT, REF_MS, conv, row, table_of

from edgeprune.errors import TableError
from edgeprune.latency.table import (
    LatencyTable,
    Measurement,
    MemoryRow,
    NetworkRow,
    OverheadRow,
    StairsRow,
    open_table,
    shipped_tables,
    table_path,
)


def lines(table):
    return table.path.read_bytes().splitlines()


def test_rows_come_back(tmp_path):
    table = table_of(tmp_path, [conv(16, 16), conv(32, 16)], lambda k: 0.1)
    network = NetworkRow("n", (conv(16, 16).key(),), 1.5, 0.01, 20, 2.0)
    table.append([network, OverheadRow("o", 0.002, 0.003, 0.2), MemoryRow("m", 1.0, 2.0, 0.3, 0.2)])
    again = LatencyTable(table.path, FINGERPRINT)
    assert (again.rows, again.networks) == (table.rows, table.networks)
    assert (again.overheads, again.memory) == (table.overheads, table.memory)
    assert again.networks["n"] == network


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 400), data=st.data())
def test_a_torn_end_is_dropped_and_overwritten(cut, data, tmp_path_factory):
    table = table_of(tmp_path_factory.mktemp("t"), [conv(c, 16) for c in range(1, 9)], lambda k: 0.1)
    whole = table.path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    table.path.write_bytes(whole[:cut])
    torn = LatencyTable(table.path, FINGERPRINT)
    kept = set(torn.rows)
    assert len(kept) == max(0, whole[:cut].count(b"\n") - 1)
    torn.append([row(conv(c, 16), 0.1) for c in range(1, 9)])
    assert torn.path.read_bytes() == whole
    assert set(LatencyTable(table.path, FINGERPRINT).rows) == set(table.rows)


def test_a_row_is_written_once(tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    other = LatencyTable(table.path, FINGERPRINT)
    table.append([row(conv(32, 16), 0.2)])
    other.append([row(conv(32, 16), 0.9), row(conv(48, 16), 0.3), row(conv(48, 16), 0.4)])
    assert len(lines(other)) == 4
    assert other.rows[conv(32, 16).key()].hot_ms == 0.2
    table.reload()
    assert table.rows == other.rows


def _append_many(path, start):
    table = LatencyTable(path, FINGERPRINT)
    for c in range(start, start + 40):
        table.append([row(conv(c, 16), 0.1)])


def test_two_processes_at_once(tmp_path):
    path = tmp_path / "sub" / "table.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, start)) for start in (1, 20, 30)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    table = LatencyTable(path, FINGERPRINT)
    assert len(table.rows) == 69
    assert len(lines(table)) == 70
    assert all(json.loads(line) for line in lines(table))


def test_what_was_decided_first_stays(tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    table.append([StairsRow("net", {"conv": (8, 16)})])
    table.append([StairsRow("net", {"conv": (4, 16)}), StairsRow("other", {})])
    again = LatencyTable(table.path, FINGERPRINT)
    assert {key: dict(r.widths) for key, r in again.stairs.items()} == {"net": {"conv": [8, 16]}, "other": {}}
    assert again.rows == table.rows


def test_another_fingerprint_is_refused(tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    other = dataclasses.replace(FINGERPRINT, runtime_version="2.0")
    with pytest.raises(TableError, match=r"runtime_version '1.0' instead of '2.0'; rows never mix"):
        LatencyTable(table.path, other)
    assert table_path(other) != table_path(FINGERPRINT)


@pytest.mark.parametrize("garbage", [b"{}\n", b"not json\n", b'{"kind": "song"}\n', b'{"kind": "kernel"}\n', b"[]\n"])
def test_damage_in_the_middle_is_named(garbage, tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    table.path.write_bytes(table.path.read_bytes() + garbage + b'{"kind": "kernel", "key": "x"}\n')
    with pytest.raises(TableError, match="damaged at byte"):
        LatencyTable(table.path, FINGERPRINT)


def test_not_a_table(tmp_path):
    (tmp_path / "table.jsonl").write_text("hello\n")
    with pytest.raises(TableError, match="damaged at byte 0"):
        LatencyTable(tmp_path / "table.jsonl", FINGERPRINT)


def test_missing_keeps_order_and_failed_rows_are_rows(tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    table.append([Measurement(conv(32, 16).key(), error="no such operator")])
    wanted = [conv(64, 16), conv(32, 16), conv(16, 16), conv(48, 16), conv(64, 16)]
    assert table.missing(wanted) == [conv(64, 16), conv(48, 16)]


def test_times_follow_the_reference_of_their_batch(tmp_path):
    table = table_of(tmp_path, [conv(c, 16) for c in range(1, 20)], lambda k: 0.1)
    slow = Measurement(conv(64, 64).key(), 0.4, 0.8, 1, 2 * REF_MS, 2 * REF_MS, REF_MS / 4, 0.01, 20)
    table.append([slow])
    assert table.reference_ms == pytest.approx(REF_MS)
    assert table.ms(slow.key, cold=0) == pytest.approx(0.2)
    assert table.ms(slow.key) == pytest.approx(0.4)
    assert table.ms(slow.key, cold=0.5) == pytest.approx(0.3)


def test_the_profilers_cost_is_taken_off_every_node(tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    key = conv(32, 32).key()
    table.append([Measurement(key, 0.05, 0.06, 3, REF_MS, REF_MS), OverheadRow("o", 0.002, 0.004, REF_MS)])
    assert table.ms(key, cold=0) == pytest.approx(0.05 - 3 * 0.002)
    assert table.ms(key, cold=1) == pytest.approx(max(0.06 - 3 * 0.004, 0.05 - 3 * 0.002))
    assert table.reference_ms == pytest.approx(REF_MS - 0.002)


def test_never_negative(tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    table.append([Measurement("tiny", 0.001, 0.001, 1, REF_MS, REF_MS), OverheadRow("o", 0.01, 0.01, REF_MS)])
    assert 0 < table.ms("tiny") < 0.001


def test_no_row_names_kernel_and_command(tmp_path):
    table = table_of(tmp_path, [conv(16, 16)], lambda k: 0.1)
    with pytest.raises(TableError) as error:
        table.ms(conv(1, 1).key())
    assert conv(1, 1).key() in str(error.value)
    assert "edgeprune profile --target cpu" in str(error.value)
    with pytest.raises(TableError, match="is empty; fill it with"):
        _ = LatencyTable(tmp_path / "none.jsonl", FINGERPRINT).reference_ms


def test_own_home_holds_tables_and_shipped_ones_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    assert tmp_path in open_table(FINGERPRINT).path.parents
    assert open_table(FINGERPRINT).rows == {}
    assert shipped_tables("cpu-of-nobody") == []
    (tmp_path / "profiles" / "mine").mkdir(parents=True)
    (tmp_path / "profiles" / "mine" / "a.jsonl").touch()
    assert shipped_tables("mine") == [tmp_path / "profiles" / "mine" / "a.jsonl"]
