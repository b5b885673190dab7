import pytest

from edgeprune.deploy.bundle import write_bundle, write_files
from edgeprune.errors import UsageError


def test_all_four_files(tmp_path):
    paths = write_bundle(
        tmp_path / "new" / "out", "net", onnx=b"O", save_network=lambda p: p.write_text("N"), plan="{}", report='"é"'
    )
    assert {k: p.name for k, p in paths.items()} == {
        "onnx": "net.onnx", "pt2": "net.pt2", "plan": "plan.json", "report": "report.json",
    }  # fmt: skip
    assert [p.read_bytes() for p in paths.values()] == [b"O", b"N", b"{}", '"é"'.encode()]
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == sorted(p.name for p in paths.values())


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
