"""Every fault of a remote device, made for real on a real server: it ends in a retry or in one clear line, and the
table holds each row once, none of them wrong."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from loopback import command_of, descendants, lives, server, wait_until  # noqa: F401  (server is a fixture)
from test_pipe_device import run_tiny

from edgeprune.device import ssh
from edgeprune.device.connect import connect
from edgeprune.device.device import DeviceChangedError, DeviceLostError, Job, agent_source
from edgeprune.device.ssh import SshDevice
from edgeprune.errors import DeviceError
from edgeprune.latency import sweep
from edgeprune.latency.measure import REFERENCE
from edgeprune.latency.table import LatencyTable

KERNELS = [dataclasses.replace(REFERENCE, inputs=((1, c, 8, 8),), output=(1, 16, 8, 8)) for c in range(1, 25)]
BAD_JOBS = """
def crash(job, blobs):
    os.kill(os.getpid(), 11)

def spin(job, blobs):
    return sum(iter(int, 1))

def cut(job, blobs):  # the connection that this very job came by
    pid = os.getpid()
    while b"sshd" not in open("/proc/%d/cmdline" % pid, "rb").read():
        pid = int(open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[1])
    os.kill(pid, 9)
    time.sleep(60)

JOBS.update(crash=crash, spin=spin, cut=cut)

main(JOBS)
"""


def bad_device(server, say=lambda text: None, **fields):  # noqa: F811
    return SshDevice(server.target(**fields), "board", agent_source().replace("\nmain(JOBS)\n", BAD_JOBS), say)


def rows_in(path: Path) -> Counter:
    documents = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    assert not [d for d in documents if d.get("error")]
    return Counter(d["key"] for d in documents if d.get("kind") == "kernel")


class Trouble:
    """As a sweep's progress: does something in the middle of the batches after these."""

    def __init__(self, action, *after: int):
        self.action, self.after, self.calls, self.threads = action, after, 0, []

    def __call__(self, done, total):
        self.calls += 1
        if self.calls in self.after:
            self.threads.append(threading.Timer(0.03, self.action))
            self.threads[-1].start()

    def join(self):
        assert len(self.threads) == len(self.after)
        for thread in self.threads:
            thread.join()


def troubled_sweep(device, path, action, *after):
    table = LatencyTable(path, device.fingerprint)
    trouble = Trouble(action, *after)
    stats = sweep.profile(device, table, KERNELS, trouble)
    trouble.join()
    assert rows_in(path) == Counter(kernel.key() for kernel in KERNELS)
    assert (stats.measured, stats.failed) == (len(KERNELS), 0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.jsonl"


def test_a_link_that_drops_in_a_sweep(server, path):  # noqa: F811
    said = []
    with connect(server.target(), said.append) as device:
        troubled_sweep(device, path, server.drop, 1, 3)
    assert "board: link lost, connecting again" in said


def test_a_machine_that_reboots_in_a_sweep(server, path):  # noqa: F811
    def reboot():
        server.stop()
        time.sleep(3)
        server.start()

    said = []
    with connect(server.target(), said.append) as device:
        troubled_sweep(device, path, reboot, 2)
    assert any("does not answer (rebooting?), waiting 2" in text for text in said)


@pytest.mark.slow
def test_an_agent_that_is_ended_from_outside(server, path):  # noqa: F811
    with connect(server.target()) as device:

        def end():
            for pid in server.agents():
                os.kill(pid, signal.SIGTERM)

        troubled_sweep(device, path, end, 2)


@pytest.mark.slow
def test_a_link_that_is_dead_without_a_word(server, path):  # noqa: F811
    stopped = []

    def freeze():
        for pid in descendants(server.process.pid):
            if command_of(pid).startswith("sshd"):
                stopped.append(pid)
                os.kill(pid, signal.SIGSTOP)

    options = ("ServerAliveInterval=1", "ServerAliveCountMax=1")
    try:
        with connect(server.target(ssh_options=options)) as device:
            troubled_sweep(device, path, freeze, 2)
        assert stopped
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_link_that_drops_again_and_again(server):  # noqa: F811
    said = []
    with bad_device(server, said.append) as device:
        run_tiny(device)
        with pytest.raises(
            DeviceError, match=r"cut: .*that was the 4th time in one job. Look there \(`ssh -F"
        ) as error:
            device.run(Job("cut", {}))
        assert not isinstance(error.value, DeviceLostError)  # no kernel is to blame
        assert "\n" not in str(error.value)
        assert said == ["board: link lost, connecting again"] * 3
        run_tiny(device)


def test_a_machine_that_does_not_come_back(server, path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ssh, "WAIT_LIMIT_S", 1.5)
    with connect(server.target()) as device:
        table = LatencyTable(path, device.fingerprint)
        try:
            trouble = Trouble(server.stop, 2)
            with pytest.raises(DeviceError, match=r"Connection refused.*; no answer for \d+ s; try `ssh") as error:
                sweep.profile(device, table, KERNELS, trouble)
            assert not isinstance(error.value, DeviceLostError)
        finally:
            trouble.join()
            server.start()
        before = rows_in(path)
        assert 0 < sum(before.values()) < len(KERNELS)
        assert sweep.profile(device, table, KERNELS).known == sum(before.values())
        assert rows_in(path) == Counter(kernel.key() for kernel in KERNELS)


def test_a_job_that_hangs_is_ended_there_too(server):  # noqa: F811
    with bad_device(server) as device:
        run_tiny(device)
        there = server.agents()
        assert len(there) >= 3  # shell, agent and guard
        start = time.monotonic()
        with pytest.raises(DeviceLostError, match="target board on board, spin: no answer in time"):
            device.run(Job("spin", {}, timeout_s=1))
        assert wait_until(lambda: not any(map(lives, there)), 5), [command_of(pid) for pid in there if lives(pid)]
        assert time.monotonic() - start < 8
        run_tiny(device)


@pytest.mark.slow
def test_a_crash_of_the_agent_is_not_a_lost_link(server):  # noqa: F811
    with bad_device(server) as device:
        run_tiny(device)
        with pytest.raises(DeviceLostError, match=r"crash: the agent ended without an answer \(exit code 139"):
            device.run(Job("crash", {}))
        run_tiny(device)


@pytest.mark.slow
def test_this_side_that_is_killed_leaves_nothing_running_there(server, tmp_path):  # noqa: F811
    kept = pickle.dumps(server.target())
    script = f"""
import pickle, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_ssh_faults import *
class Kept:
    def target(self):
        return pickle.loads({kept!r})
with bad_device(Kept()) as device:
    run_tiny(device)
    print("spinning", flush=True)
    device.run(Job("spin", {{}}))
"""
    before = set(server.agents())
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"spinning\n"
    there = set(server.agents()) - before
    assert there
    time.sleep(0.3)
    process.kill()
    process.wait()
    process.stdout.close()
    assert wait_until(lambda: not any(map(lives, there)), 8)


def limited(folder: Path, command: str) -> str:
    """An interpreter that runs after ``command``."""
    python = folder / "limited-python"
    python.write_text(f'#!/bin/sh\n{command}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def full_disk(server, path, device):  # noqa: F811
    """What a sweep does on a device whose disk is full from the beginning."""
    table = LatencyTable(path, device.fingerprint)
    with pytest.raises(DeviceError, match=r"its disk is full: no 64 MB can be written to /.*make room there") as error:
        sweep.profile(device, table, KERNELS[:8])
    assert not isinstance(error.value, DeviceLostError)
    assert "\n" not in str(error.value)
    assert not rows_in(path)


def test_a_disk_that_takes_no_file(server, path, tmp_path):  # noqa: F811
    with connect(server.target(python=limited(tmp_path, "ulimit -f 8"))) as device:  # 4 KB: a profile does not fit
        full_disk(server, path, device)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk(server, path, tmp_path, tiny_disk):  # noqa: F811
    source = agent_source().replace('"/tmp", "/var/tmp", "/dev/shm"', '"/no/such/place"')
    (tiny_disk / "ballast").write_bytes(bytes(240 << 10))
    target = server.target(python=limited(tmp_path, f"export TMPDIR={tiny_disk}"))
    with SshDevice(target, "board", source) as device:
        full_disk(server, path, device)
        (tiny_disk / "ballast").unlink()  # not room enough, and an agent that finds out in the middle
        full_disk(server, path, device)


@pytest.mark.slow
def test_a_full_disk_is_gone_round(server, path, tmp_path, tiny_disk):  # noqa: F811
    target = server.target(python=limited(tmp_path, f"export TMPDIR={tiny_disk}"))
    with connect(target) as device:
        table = LatencyTable(path, device.fingerprint)
        assert sweep.profile(device, table, KERNELS[:4]).measured == 4
    assert list(tiny_disk.iterdir()) == []


def test_a_power_mode_that_changes_in_a_sweep(server, path, tmp_path):  # noqa: F811
    mode = tmp_path / "status"
    mode.write_text("pmode:0000\n")
    source = agent_source().replace("/var/lib/nvpmodel/status", str(mode))
    with SshDevice(server.target(), "board", source) as device:
        assert "nvpmodel pmode:0000" in device.fingerprint.power
        table = LatencyTable(path, device.fingerprint)
        trouble = Trouble(lambda: mode.write_text("pmode:0002\n"), 2)
        with pytest.raises(DeviceChangedError, match="pmode:0000.*pmode:0002.*set it back"):
            sweep.profile(device, table, KERNELS, trouble)
        trouble.join()
        before = rows_in(path)
        assert 0 < sum(before.values()) < len(KERNELS)
        changed = mode.stat().st_mtime
        times = [json.loads(line).get("time", 0) for line in path.read_bytes().splitlines()]
        assert max(times) <= changed + 0.15  # rows tell tenths of a second
        with pytest.raises(DeviceChangedError):
            sweep.profile(device, table, KERNELS)
        mode.write_text("pmode:0000\n")
        assert sweep.profile(device, table, KERNELS).known == sum(before.values())
        assert rows_in(path) == Counter(kernel.key() for kernel in KERNELS)
