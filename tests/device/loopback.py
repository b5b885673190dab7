"""A real ssh server on this machine for the tests: its own host key, its own known hosts, a free port, this user."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.device.target import Protocol, Target

QUICK = Protocol(warmup_ms=1, kernel_ms=1, evict_mb=1, batch_ms=0.04, rounds=3, round_ms=2)
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Server:
    """Hosts ``board`` and ``twin`` are this server; ``closed`` is a port where nobody listens, ``stranger`` this server
    under a name whose host key is not known, ``impostor`` one under a name that had another key."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("host", "other", "user", "unknown"):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
        shutil.copy(folder / "user.pub", folder / "authorized")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.known = folder / "known_hosts"
        key, other = ((folder / f"{name}.pub").read_text() for name in ("host", "other"))
        names = [(name, key) for name in ("board", "twin")] + [("impostor", other)]
        self.known.write_text("".join(f"{name} {kind}" for name, kind in names))
        self.config = folder / "config"
        hosts = [f"Host {name}\n HostKeyAlias {name}\n" for name in ("board", "twin", "stranger", "impostor")]
        self.config.write_text(
            "".join(hosts)
            + f"Host locked\n HostKeyAlias board\n IdentityFile {folder / 'unknown'}\n"
            + "Host closed\n Port 1\n"
            + "Host nowhere\n HostName no-such-machine.invalid\n"
            + f"Host *\n HostName 127.0.0.1\n Port {self.port}\n User {getpass.getuser()}\n IdentitiesOnly yes\n"
            + f" UserKnownHostsFile {self.known}\n GlobalKnownHostsFile none\n"
            + f"Host * !locked\n IdentityFile {folder / 'user'}\n"
        )
        self.start()

    @property
    def settings(self) -> str:
        return "\n".join(
            [
                f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder / 'host'}",
                f"AuthorizedKeysFile {self.folder / 'authorized'}", f"PidFile {self.folder / 'pid'}",
                "StrictModes no", f"UsePAM {'yes' if os.geteuid() == 0 else 'no'}", "PasswordAuthentication no",
                "KbdInteractiveAuthentication no", "PermitRootLogin prohibit-password", "MaxStartups 50",
            ]
        )  # fmt: skip

    def start(self, *settings: str) -> None:
        """Further settings come first, and the first one holds."""
        path = self.folder / "sshd_config"
        path.write_text("\n".join([*settings, self.settings, ""]))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where it wants to be locked in
        self.process = subprocess.Popen([SSHD, "-D", "-f", path, "-E", self.folder / "log"])
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(f"sshd does not start: {(self.folder / 'log').read_text()}")

    def stop(self) -> None:
        """End the server and every session of it, as a reboot does."""
        if self.process is not None:
            sessions = descendants(self.process.pid)
            self.process.terminate()
            self.process.wait()
            for pid in sessions:
                kill(pid)
            self.process = None

    def drop(self) -> int:
        """Kill the connections and leave the server, as a broken link does; how many processes that were."""
        assert self.process is not None
        sessions = [pid for pid in descendants(self.process.pid) if command_of(pid).startswith("sshd")]
        for pid in sessions:
            kill(pid)
        return len(sessions)

    def agents(self) -> list[int]:
        """The processes of agents that this server started: shells, interpreters and guards."""
        assert self.process is not None
        return [pid for pid in descendants(self.process.pid) if "exec(sys.stdin.buffer.read(" in command_of(pid)]

    def target(self, host: str = "board", **fields: object) -> Target:
        fields = {"python": sys.executable, "ssh_config": str(self.config), "protocol": QUICK, **fields}
        return Target("board", device="ssh", host=host, **fields)

    @staticmethod
    def _run(*words: object) -> None:
        subprocess.run([str(word) for word in words], check=True)


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    """A process that ended and was not waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no sshd here: apt-get install openssh-server")
    opened = Server(tmp_path_factory.mktemp("sshd"))
    yield opened
    opened.stop()
