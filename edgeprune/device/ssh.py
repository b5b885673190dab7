"""SshDevice: an agent on another machine, through the ``ssh`` program, so that the user's own configuration, keys,
jump hosts and known hosts hold. Host keys are always checked, and nothing is asked for at a prompt.

One connection is kept for all agents of a device (ControlMaster), behind a socket in a private folder. A link that
drops is taken up again and the job given once more; a machine that reboots is waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.device.device import DeviceLostError, Job, LinkLostError, Result, Say, silent
from edgeprune.device.pipe import PipeDevice
from edgeprune.device.target import Target
from edgeprune.errors import DeviceError

SSH = "ssh"
LINK_LOSSES = 4  # so often a job may lose the link
WAIT_LIMIT_S = 240.0  # for a machine that answered before: a board's reboot takes a minute or two
PAUSES_S = (1.0, 2.0, 4.0, 8.0)
OLD_PYTHON = 43  # exit code of our own
SSH_FAILED = 255
STOPPED = (128 + 1, 128 + 15)  # hung up, terminated: somebody ends processes there, it is not the job

FIXED = (
    "BatchMode=yes", "StrictHostKeyChecking=yes", "NoHostAuthenticationForLocalhost=no", "ClearAllForwardings=yes",
    "RemoteCommand=none", "PermitLocalCommand=no", "RequestTTY=no",
)  # fmt: skip
DEFAULTS = ("ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")


class NoAnswerError(LinkLostError):
    """There was no link to lose."""


# what ssh says -> (the kind of error, what it means)
MEANINGS = (
    (r"booting up|going down", LinkLostError, "it is starting or stopping"),
    (r"IDENTIFICATION HAS CHANGED", DeviceError,
     "its host key is not the known one; if the machine was set up anew, forget the old one with "
     "`ssh-keygen -R {name}` and check the new one with `{ssh}`"),
    (r"[Hh]ost key verification failed|No .* host key is known", DeviceError,
     "its host key is not known here; check it by hand once: `{ssh}`"),
    (r"Permission denied|Too many authentication failures", DeviceError,
     "it does not let us in without a password; give it your key with `ssh-copy-id {copy}`"),
    (r"[Bb]ad (configuration|owner)|Can't open user config|[Uu]nsupported option|keyword .* extra arguments",
     DeviceError, "ssh refuses its configuration"),
    (r"Could not resolve|Name or service not known", NoAnswerError, "no machine of that name is found"),
    (r"connect to (host|address)", NoAnswerError, "it cannot be reached"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Address:
    """``user`` and ``port`` may be empty: ssh's own configuration decides then."""

    host: str
    user: str = ""
    port: int = 0

    def arguments(self) -> list[str]:
        port = ["-p", str(self.port)] if self.port else []
        return [*port, *(["-l", self.user] if self.user else []), "--", self.host]

    @property
    def known_as(self) -> str:
        """How the file of known hosts names it."""
        return shlex.quote(f"[{self.host}]:{self.port}" if self.port not in (0, 22) else self.host)


_ADDRESS = re.compile(
    r"(?:ssh://)?(?:(?P<user>[\w.+-]+)@)?(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[\w.-]+))(?::(?P<port>\d+))?/?",
    re.ASCII,
)


def parse_address(text: str, user: str = "", port: int = 0) -> Address:
    """HOST, USER@HOST, USER@HOST:PORT, [IPV6]:PORT, ssh://... Raises DeviceError for anything else."""
    match = _ADDRESS.fullmatch(text.strip())
    host = (match["six"] or match["host"]) if match else ""
    if not match or host.startswith("-") or (match["user"] or "").startswith("-") or int(match["port"] or 0) > 65535:
        raise DeviceError(f"host {text!r}: expected HOST, USER@HOST or USER@HOST:PORT ([ADDRESS]:PORT for IPv6)")
    return Address(host, match["user"] or user, int(match["port"] or port))


def check_options(target: Target) -> None:
    """Raises DeviceError for an option of ssh that is none, or that would skip the check of host keys."""
    for option in target.ssh_options:
        key, _, value = option.partition("=")
        if not re.fullmatch(r"[A-Za-z]+", key.strip()) or not value.strip():
            raise DeviceError(f"target {target.name}: ssh option {option!r}; expected 'Key=value'")
        word = value.strip().strip("\"'").lower()
        name = key.strip().lower()
        skips = name == "stricthostkeychecking" and word not in ("yes", "ask", "true")
        skips |= name in ("knownhostscommand", "nohostauthenticationforlocalhost") and word not in ("none", "no")
        if skips or (name.endswith("knownhostsfile") and "/dev/null" in word):
            raise DeviceError(
                f"target {target.name}: ssh option {option!r} skips the check of host keys; check the key by hand once "
                "with `ssh HOST` instead"
            )


class SshDevice(PipeDevice):
    """``host`` is one of the target's. Raises DeviceError when it is no address, and for options that are refused."""

    def __init__(self, target: Target, host: str, source: str | None = None, say: Say = silent):
        super().__init__(target, source=source, say=say)
        check_options(target)
        self.address = parse_address(host, target.user, target.port)
        self.where = f"target {target.name} on {host.strip()}"
        self._folder = tempfile.mkdtemp(prefix="edgeprune-ssh-")
        self._socket = os.path.join(self._folder, "s")

    def run(self, job: Job) -> Result:
        """As PipeDevice.run, except that a job whose link breaks is given again. Raises DeviceError when it breaks
        again and again, or the machine does not come back."""
        for lost in itertools.count(1):
            try:
                return super().run(job)
            except LinkLostError as error:
                self._hang_up()
                if lost == LINK_LOSSES:
                    raise DeviceError(
                        f"{error}; that was the {lost}th time in one job. Look there (`{self._by_hand()}`), then give "
                        "the same command again: what is measured is kept"
                    ) from None
                self.say(f"{self.address.host}: link lost, connecting again")
        raise AssertionError("unreachable")

    def close(self) -> None:
        super().close()
        self._hang_up()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ready(self, limit_s: float) -> None:
        pauses = itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1]))
        since, tried = time.monotonic(), 0
        while True:
            try:
                return super()._ready(limit_s)
            except LinkLostError as error:
                self._hang_up()
                left_s = since + WAIT_LIMIT_S - time.monotonic()
                tried += 1
                if left_s <= 0 or (self._fingerprint is None and (isinstance(error, NoAnswerError) or tried == 3)):
                    waited = f" for {time.monotonic() - since:.0f} s" if self._fingerprint else ""
                    raise DeviceError(
                        f"{error}{waited and '; no answer' + waited}; try `{self._by_hand()}`, then give the same "
                        "command again"
                    ) from None
                self.say(f"{self.address.host} does not answer (rebooting?), waiting {left_s:.0f} s at most")
                time.sleep(min(next(pauses), left_s))

    def _command(self, boot: str) -> Sequence[str]:
        """``sh`` outlives Python there, and so tells a crash by its exit code: ssh would tell it as its own failure."""
        old = f"import sys;sys.version_info<(3,8)and sys.exit({OLD_PYTHON});{boot}"
        threads = self.target.runtime.threads
        program = f'OMP_NUM_THREADS={threads} {self._interpreter()} -u -c "{old}"; exit $?'
        return [*self._ssh(), *self.address.arguments(), f"sh -c {shlex.quote(program)}"]

    def _interpreter(self) -> str:
        """Quoted for the shell there, which knows where ~ is."""
        python = self.target.python
        return "~/" + shlex.quote(python[2:]) if python.startswith("~/") else shlex.quote(python)

    def _install_command(self) -> str:
        return f"`{self._by_hand()} {self._interpreter()} -m pip install numpy {self.target.runtime.name}`"

    def _by_hand(self) -> str:
        """The command line with which a person gets there."""
        own = [word for option in self.target.ssh_options for word in ("-o", option)]
        config = ["-F", self.target.ssh_config] if self.target.ssh_config else []
        arguments = [word for word in self.address.arguments() if word != "--"]
        return shlex.join([SSH, *config, *own, *arguments])

    def _ssh(self) -> list[str]:
        """ssh takes the first value that it meets, so what must hold comes before what the user may set."""
        shared = (
            (f"ControlPath={self._socket}", "ControlMaster=auto", "ControlPersist=60") if os.name == "posix" else ()
        )
        options = (*FIXED, *shared, *self.target.ssh_options, *DEFAULTS)
        config = ["-F", os.path.expanduser(self.target.ssh_config)] if self.target.ssh_config else []
        return [SSH, "-x", "-a", *config, *(word for option in options for word in ("-o", option))]

    def _hang_up(self) -> None:
        """Close the shared connection, which may be dead without knowing it."""
        if os.path.exists(self._socket):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    [*self._ssh(), "-O", "exit", *self.address.arguments()], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=5,
                )  # fmt: skip
            with contextlib.suppress(OSError):
                os.unlink(self._socket)

    def _verdict(self, where: str, error: DeviceLostError, code: int) -> DeviceError:
        python, host = self.target.python, self.address.host
        if code in (126, 127, OLD_PYTHON):
            found = "is older than 3.8" if code == OLD_PYTHON else "cannot be run"
            return DeviceError(
                f"{where}: {python} {found} there; install Python 3.8 or newer, or name the interpreter in the "
                'target file: python = "/path/to/python3"'
            )
        if code in STOPPED:
            return LinkLostError(f"{where}: its agent was ended from outside (exit code {code})")
        if code != SSH_FAILED:
            return super()._verdict(where, error, code)
        said = [" ".join(line.split()) for line in self._said if line.strip()]
        last = next((f" ({line[:300]})" for line in reversed(said) if not line.startswith("Host key verif")), "")
        for pattern, kind, meaning in MEANINGS if where == self.where else ():  # in a job there was a link
            if re.search(pattern, "\n".join(said)):
                copy = f"{'-p ' + str(self.address.port) + ' ' if self.address.port else ''}"
                copy += f"{self.address.user + '@' if self.address.user else ''}{host}"
                text = meaning.format(name=self.address.known_as, ssh=self._by_hand(), copy=copy)
                return kind(f"{where}: {text}{last}")
        return LinkLostError(f"{where}: the link is lost{last}")
