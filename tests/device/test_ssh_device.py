"""The ssh device against a real server on this machine: what arrives, what is refused, and in which words."""

import dataclasses
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from loopback import lives, server, wait_until  # noqa: F401  (a fixture)
from test_pipe_device import run_tiny, tiny_model

from edgeprune.device.connect import connect
from edgeprune.device.device import Job
from edgeprune.device.ssh import Address, SshDevice, parse_address
from edgeprune.device.target import Target, find_target
from edgeprune.errors import DeviceError


@pytest.fixture(scope="module")
def board(server):  # noqa: F811
    with connect(server.target()) as opened:
        yield opened


def test_outputs_come_back(board):
    np.testing.assert_array_equal(run_tiny(board), [0, 2, 0, 4])


def test_the_fingerprint_is_this_machines(board, server):  # noqa: F811
    with connect(dataclasses.replace(server.target(), device="local")) as local:
        assert board.fingerprint == local.fingerprint


def test_a_large_job_comes_back_whole(board):
    x = np.random.default_rng(0).standard_normal((1, 3_000_000)).astype(np.float32)
    job = Job("run", {"inputs": [["x", "float32", list(x.shape)]]}, [tiny_model(x.size), x.tobytes()])
    result = board.run(job)
    assert result.ok, result.error
    np.testing.assert_array_equal(np.frombuffer(result.blobs[0], np.float32), np.maximum(x, 0).ravel())


def test_nothing_is_left_behind(server, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # of this side
    others = server.agents()
    with connect(server.target()) as device:
        run_tiny(device)
        there = set(server.agents()) - set(others)
        folders = [folder for pid in there for folder in Path("/tmp").glob(f"edgeprune-agent-{pid}-*")]
        assert folders
        assert list(tmp_path.iterdir())
    assert wait_until(lambda: not any(map(lives, there)), 5)
    assert not any(folder.exists() for folder in folders)
    assert list(tmp_path.iterdir()) == []


def test_a_second_agent_uses_the_same_connection(server):  # noqa: F811
    with connect(server.target()) as device:
        run_tiny(device)
        log = (server.folder / "log").read_text().count("Accepted publickey")
        device._end()
        run_tiny(device)
        assert (server.folder / "log").read_text().count("Accepted publickey") == log


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "stranger"}, r"host key is not known here; check it by hand once: `ssh -F \S+ stranger`"),
        ({"host": "impostor"}, r"host key is not the known one; .*`ssh-keygen -R impostor`"),
        ({"host": "locked"}, r"does not let us in without a password; give it your key with `ssh-copy-id locked`"),
        ({"host": "closed"}, r"Connection refused.*try `ssh -F \S+ closed`"),
        ({"host": "nowhere"}, r"no machine of that name is found"),
        ({"python": "no-such-python3"}, r"no-such-python3 cannot be run there; install Python 3.8 or newer, or name"),
        ({"python": "/etc/passwd"}, r"/etc/passwd cannot be run there"),
        ({"ssh_options": ("NoSuchOption=1",)}, r"ssh refuses its configuration"),
        ({"ssh_config": "/no/such/file"}, r"ssh refuses its configuration.*/no/such/file"),
    ],
)
def test_what_keeps_us_out_is_one_line_that_mends_it(server, fields, message):  # noqa: F811
    start = time.monotonic()
    with connect(server.target(**{"host": "board", **fields})) as device:
        with pytest.raises(DeviceError, match=message) as error:
            device.fingerprint  # noqa: B018
        assert "\n" not in str(error.value)
        assert "target board on " in str(error.value)
    assert time.monotonic() - start < 15


def test_no_runtime_there_names_the_command(server, tmp_path):  # noqa: F811
    bare = tmp_path / "bare python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    with connect(server.target(python=f"{bare}/bin/python3")) as device:
        with pytest.raises(DeviceError, match="No module named") as error:
            device.fingerprint  # noqa: B018
        assert f"board '{bare}/bin/python3' -m pip install numpy onnxruntime`" in str(error.value)


def test_an_old_interpreter_is_told(server, tmp_path):  # noqa: F811
    old = tmp_path / "python2"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise SystemExit(43)'\n")
    old.chmod(0o755)
    with connect(server.target(python=str(old))) as device, pytest.raises(DeviceError, match="is older than 3.8"):
        device.fingerprint  # noqa: B018


def test_a_home_directory_is_the_one_there(server):  # noqa: F811
    home = pwd.getpwuid(os.getuid()).pw_dir  # where ssh begins, whatever $HOME is here
    python = os.path.relpath(sys.executable, home)
    with connect(server.target(python=f"~/{python}")) as device:
        assert device.fingerprint.threads == 1


def test_more_threads_than_it_has_are_refused(server):  # noqa: F811
    target = server.target().with_threads(4096)
    with connect(target) as device, pytest.raises(DeviceError, match="4096 threads asked; it has"):
        device.fingerprint  # noqa: B018


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nano", Address("nano")),
        ("pi@nano", Address("nano", "pi")),
        ("pi@nano.local:2222", Address("nano.local", "pi", 2222)),
        ("ssh://pi@nano:22/", Address("nano", "pi", 22)),
        ("[fe80::1%eth0]:2222", Address("fe80::1%eth0", "", 2222)),
        (" nano ", Address("nano")),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert parse_address(text, "jetson", 7) == Address(address.host, address.user or "jetson", address.port or 7)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=x",
        "a b",
        "-l@host",
        "host:99999",
        "fe80::1",
        "a@b@c",
        "@host",
        "a;b",
        "$(x)",
        "a`b`",
        "p$i@nano",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(DeviceError, match="expected HOST, USER@HOST"):
        parse_address(text)


@pytest.mark.parametrize(
    "option",
    [
        "StrictHostKeyChecking=no",
        "stricthostkeychecking = accept-new",
        "UserKnownHostsFile=/dev/null",
        "-oFoo",
        "Foo",
        "KnownHostsCommand=ssh-keyscan %H",
        "NoHostAuthenticationForLocalhost=yes",
    ],
)
def test_options_that_skip_checks_or_are_none_are_refused(option):
    with pytest.raises(DeviceError, match="host keys|expected 'Key=value'"):
        SshDevice(Target("x", device="ssh", ssh_options=(option,)), "nano")


def test_an_ssh_target_needs_a_host():
    with pytest.raises(DeviceError, match="say where it is: --on HOST"):
        connect(Target("x", device="ssh"))


def test_hosts_can_be_named_for_any_target(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    target = find_target("cpu", threads=64, on="pi@nano")  # as many as this machine may not have
    assert (target.device, target.host, target.runtime.threads) == ("ssh", "pi@nano", 64)
    with pytest.raises(DeviceError, match="expected HOST or HOST,HOST"):
        find_target("cpu", on="nano,")
    with pytest.raises(DeviceError, match="its device is 'pigeon'"):
        Target("x", device="pigeon").on("nano")


def test_a_configuration_that_skips_the_check_of_host_keys_does_not(server, tmp_path):  # noqa: F811
    target = server.target(host="stranger")
    own = tmp_path / "config"
    skip = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nNoHostAuthenticationForLocalhost yes\n"
    own.write_text(skip + Path(target.ssh_config).read_text())
    skipping = connect(dataclasses.replace(target, ssh_config=str(own)))
    with skipping as device, pytest.raises(DeviceError, match="host key is not known here"):
        device.fingerprint  # noqa: B018
