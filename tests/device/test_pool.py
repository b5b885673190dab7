"""Two hosts (the same server by two names) that share a sweep; hosts that are unlike; hosts that fail in the middle."""

import os
import signal
import threading
import time
from collections import Counter

import pytest
from loopback import server  # noqa: F401  (a fixture)
from test_pipe_device import run_tiny
from test_ssh_faults import KERNELS, Trouble, bad_device, rows_in

from edgeprune.device.connect import connect
from edgeprune.device.device import DeviceLostError, Job, agent_source
from edgeprune.device.pool import PoolDevice
from edgeprune.device.ssh import SshDevice
from edgeprune.errors import DeviceError
from edgeprune.latency import sweep
from edgeprune.latency.table import LatencyTable

EVERY_KERNEL = Counter(kernel.key() for kernel in KERNELS)


def modes(server, folder):  # noqa: F811
    """A pool whose hosts each have a power mode of their own, in a file."""
    devices = {}
    for host in ("board", "twin"):
        (folder / host).write_text("pmode:0000\n")
        source = agent_source().replace("/var/lib/nvpmodel/status", str(folder / host))
        devices[host] = SshDevice(server.target(), host, source)
    return PoolDevice(devices, print)


def counting(pool):
    """How many jobs each host answers, and how many are under way at the same time."""
    jobs, under_way, most = Counter(), set(), [0]
    for host, device in pool.devices.items():

        def run(job, host=host, inner=device.run):
            under_way.add(host)
            most[0] = max(most[0], len(under_way))
            try:
                return inner(job)
            finally:
                jobs[host] += 1
                under_way.discard(host)

        device.run = run
    return jobs, most


def test_two_hosts_share_a_sweep(server, tmp_path):  # noqa: F811
    path = tmp_path / "table.jsonl"
    with connect(server.target("board,twin")) as pool, connect(server.target()) as alone:
        assert pool.fingerprint == alone.fingerprint
        jobs, most = counting(pool)
        stats = sweep.profile(pool, LatencyTable(path, pool.fingerprint), KERNELS)
    assert rows_in(path) == EVERY_KERNEL
    assert (stats.measured, stats.failed) == (len(KERNELS), 0)
    assert min(jobs.values()) >= 2
    assert most == [2]


def test_hosts_that_are_unlike_are_refused(server, tmp_path):  # noqa: F811
    with modes(server, tmp_path) as pool:
        (tmp_path / "twin").write_text("pmode:0002\n")
        with pytest.raises(
            DeviceError, match="board and twin are not alike: power '.*0000' and '.*0002'; rows"
        ) as error:
            pool.fingerprint  # noqa: B018
        assert "\n" not in str(error.value)


def test_a_host_that_changes_in_the_middle_is_left_out(server, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "table.jsonl"
    with modes(server, tmp_path) as pool:
        table = LatencyTable(path, pool.fingerprint)
        trouble = Trouble(lambda: (tmp_path / "twin").write_text("pmode:0002\n"), 2)
        stats = sweep.profile(pool, table, KERNELS, trouble)
        trouble.join()
        assert list(pool.devices) == ["board"]
        run_tiny(pool)
    assert rows_in(path) == EVERY_KERNEL
    assert (stats.measured, stats.failed) == (len(KERNELS), 0)
    assert "going on without twin: target board on twin changed while it measured" in capsys.readouterr().out


@pytest.mark.slow
def test_when_all_hosts_fail_the_reason_is_told_and_the_rest_can_follow(server, tmp_path):  # noqa: F811
    path = tmp_path / "table.jsonl"
    with modes(server, tmp_path) as pool:
        table = LatencyTable(path, pool.fingerprint)
        trouble = Trouble(lambda: [(tmp_path / name).write_text("pmode:0002\n") for name in ("board", "twin")], 2)
        with pytest.raises(DeviceError, match="changed while it measured"):
            sweep.profile(pool, table, KERNELS, trouble)
        trouble.join()
    assert 0 < sum(rows_in(path).values()) < len(KERNELS)
    with modes(server, tmp_path) as pool:
        assert sweep.profile(pool, table, KERNELS).failed == 0
    assert rows_in(path) == EVERY_KERNEL


@pytest.mark.slow
def test_a_job_that_crashes_is_not_given_to_the_other_host(server):  # noqa: F811
    with PoolDevice({"a": bad_device(server), "b": bad_device(server)}) as pool:
        run_tiny(pool)
        with pytest.raises(DeviceLostError, match="exit code 139"):
            pool.run(Job("crash", {}))
        assert list(pool.devices) == ["a", "b"]


def test_one_host_that_cannot_be_reached_is_told_at_once(server):  # noqa: F811
    with connect(server.target("board,closed")) as pool, pytest.raises(DeviceError, match="on closed: .*refused"):
        pool.fingerprint  # noqa: B018


def test_a_host_named_twice_is_refused(server):  # noqa: F811
    for hosts in ("board, board", "pi@board,board"):
        with pytest.raises(DeviceError, match="names a host twice"):
            connect(server.target(hosts, user="pi"))


class Sleepy:
    """A device that answers after a while, for what a pool does with its threads."""

    def __init__(self):
        self.target, self.closed = None, threading.Event()

    def close(self):
        self.closed.set()


def test_an_interruption_closes_the_devices_and_passes():
    pool = PoolDevice({"a": Sleepy(), "b": Sleepy()})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs beside itself

    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.share(range(10), lambda device, item: device.closed.wait(10))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 5
    assert all(device.closed.is_set() for device in pool._all)


def test_what_is_no_fault_of_a_device_ends_the_work():
    pool = PoolDevice({"a": Sleepy(), "b": Sleepy()})
    done = []

    def work(device, item):
        if item == 3:
            raise OSError("no space on this side")
        done.append(item)

    with pytest.raises(OSError, match="this side"):
        pool.share(range(1000), work)
    assert len(done) < 1000
    assert list(pool.devices) == ["a", "b"]
