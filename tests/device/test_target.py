import dataclasses

import pytest

from edgeprune.device.target import Fusion, Target, find_target, list_targets, read_target, search_path
from edgeprune.errors import DeviceError


@pytest.fixture
def own(tmp_path, monkeypatch):
    """An empty directory of the user's own."""
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    (tmp_path / "targets").mkdir()
    return tmp_path / "targets"


def test_cpu_target_is_found(own):
    target = find_target("cpu")
    assert target.runtime.name == "onnxruntime"
    assert target.runtime.threads == 1
    assert target.fusion == Fusion()


def test_own_target_comes_first(own):
    (own / "cpu.toml").write_text('name = "cpu"\ndescription = "mine"\n')
    assert find_target("cpu").description == "mine"
    assert list_targets()["cpu"].parent == own


def test_threads_can_be_overridden(own, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert find_target("cpu", threads=4).runtime.threads == 4
    with pytest.raises(DeviceError, match="this machine has 4 cores"):
        find_target("cpu", threads=5)
    with pytest.raises(DeviceError, match="at least 1"):
        find_target("cpu", threads=0)


def test_unknown_target_lists_those_known(own):
    with pytest.raises(DeviceError, match=r"no target named 'nano'; known targets: .*cpu"):
        find_target("nano")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae = 'x'", "board.toml:1: unknown key 'nmae'"),
        ("[runtime]\nthread = 1", "board.toml:2: unknown key 'runtime.thread'"),
        ("name = 'board'\n\n[ runtime ]\nthreads = 1\n[protocol] # how\n 'threads' = 1", "board.toml:6: unknown key"),
        ("# typo\n[runtme]\nthreads = 1", "board.toml:2: unknown key 'runtme'"),
        ("runtime.thread = 1", "unknown key 'runtime.thread'"),
        ("host = 'nano'", "board.toml:1: 'host' is for other machines"),
        ("device = 'ssh'\nport = 'x'", "board.toml:2: 'port' is 'x'; expected int"),
        ("[runtime]\nthreads = 'one'", "'runtime.threads' is 'one'; expected int"),
        ("[runtime]\nthreads = true", "'runtime.threads' is True"),
        ("[runtime]\nthreads = 0", "at least 1"),
        ("runtime = 3", "'runtime' is no table"),
        ("[fusion]\nconv_tail = 'Relu'", "expected a list of names"),
        ("[protocol]\nrounds = -1", "'protocol.rounds' is -1"),
        ("name = 'other'", "expected 'board'"),
        ("name = ", "cannot read target file"),
        ("\x00", "cannot read target file"),
    ],
)
def test_wrong_files_are_refused_in_one_line(text, message, own):
    path = own / "board.toml"
    path.write_text(text)
    with pytest.raises(DeviceError) as error:
        read_target(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_field_can_be_written(own):
    lines = []
    for table, value in (("runtime", Target("t").runtime), ("protocol", Target("t").protocol), ("fusion", Fusion())):
        lines.append(f"[{table}]")
        for field in dataclasses.fields(value):
            shown = getattr(value, field.name)
            lines.append(f"{field.name} = {list(shown) if isinstance(shown, tuple) else repr(shown)}")
    (own / "board.toml").write_text("\n".join(lines))
    assert find_target("board") == Target("board")


def test_an_ssh_target_is_read(own):
    keys = 'device = "ssh"\nhost = "a,b"\nuser = "pi"\nport = 22\npython = "~/v/bin/python"\n'
    (own / "board.toml").write_text(keys + 'ssh_options = ["Compression=yes"]\nssh_config = "~/lab"')
    expected = Target("board", "", "ssh", "a,b", "pi", 22, "~/v/bin/python", ("Compression=yes",), "~/lab")
    assert find_target("board") == expected
    assert find_target("board", on="c").host == "c"


def test_missing_directories_are_left_out(own):
    assert all(place.is_dir() for place in search_path("profiles"))
