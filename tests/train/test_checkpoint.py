"""Saving is atomic, loading runs no code and knows whose file it is."""

import os
import pickle

import pytest
import torch

from edgeprune.errors import UsageError
from edgeprune.train import checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "run.pt"
    state = {"identity": "a", "w": torch.randn(3), "nested": [{"x": 1.5}, (1, "two"), None]}
    checkpoint.save(path, state)
    loaded = checkpoint.load(path, "a")
    assert torch.equal(loaded["w"], state["w"])
    assert loaded["nested"] == state["nested"]
    assert os.listdir(path.parent) == ["run.pt"]


def test_nothing_there(tmp_path):
    assert checkpoint.load(tmp_path / "run.pt", "a") is None


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"identity": "a", "n": 1})

    def half(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"identity": "a", "n": 2})
    assert checkpoint.load(path, "a")["n"] == 1
    assert os.listdir(tmp_path) == ["run.pt"]


def test_what_a_killed_save_left_is_swept_up(tmp_path):
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"identity": "a"})
    (tmp_path / "run.ptabc.part").write_bytes(b"half")
    checkpoint.load(path, "a")
    assert os.listdir(tmp_path) == ["run.pt"]


def test_of_another_run(tmp_path):
    checkpoint.save(tmp_path / "run.pt", {"identity": "a"})
    with pytest.raises(UsageError, match="belongs to a run with another network"):
        checkpoint.load(tmp_path / "run.pt", "b")


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "other", "payload"])
def test_not_a_checkpoint(tmp_path, damage):
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"identity": "a", "w": torch.randn(1000)})

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    whole = path.read_bytes()
    if damage == "other":
        torch.save([1, 2], path)
    else:
        path.write_bytes(
            {"empty": b"", "truncated": whole[:900], "text": b"hello", "payload": pickle.dumps(Payload())}[damage]
        )
    with pytest.raises(UsageError, match="delete it to start from the beginning"):
        checkpoint.load(path, "a")
    assert not (tmp_path / "owned").exists()
