import pytest

from edgeprune.deploy.bundle import write_files
from edgeprune.errors import UsageError


def test_bytes_text_and_functions_are_written(tmp_path):
    folder = tmp_path / "new" / "out"
    paths = write_files(folder, {"a": b"O", "b": lambda p: p.write_text("N"), "c": '"é"'})
    assert [p.name for p in paths] == ["a", "b", "c"]
    assert [p.read_bytes() for p in paths] == [b"O", b"N", '"é"'.encode()]
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "c"]


def test_a_failure_leaves_what_was_there(tmp_path):
    write_files(tmp_path, {"a": b"old", "b": b"old"})

    def fails(path):
        path.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_files(tmp_path, {"a": b"new", "b": fails})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}


def test_files_are_replaced(tmp_path):
    write_files(tmp_path, {"a": "old"})
    write_files(tmp_path, {"a": "new"})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to"):
        write_files(tmp_path / "file", {"a": b""})
