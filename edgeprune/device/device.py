"""Device: where jobs run. One form of job and result for all of them, with a version that both ends must share.

An answer with ``ok`` false is a value: one bad kernel cannot end a sweep. What is no answer is an error that says who
is to blame: DeviceLostError the job, perhaps; any other DeviceError the device or the way to it, never the job.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from edgeprune.device.target import Target
from edgeprune.errors import DeviceError

PROTOCOL = 1  # of jobs, answers and the handshake; agent.py has the same number

Say = Callable[[str], None]  # shown to people while they wait


class DeviceLostError(DeviceError):
    """The agent died, hung or answered nonsense during a job. A new one is started by the next job."""


class AgentStartError(DeviceLostError):
    """The agent did so before it got the job."""


class LinkLostError(DeviceLostError):
    """The way to the device broke; the job may be given again."""


class DeviceChangedError(DeviceError):
    """The device is no longer the one that the fingerprint tells: another power mode, another runtime."""


@dataclass(frozen=True, slots=True)
class Job:
    op: str
    fields: Mapping[str, Any]
    blobs: Sequence[bytes] = ()
    timeout_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Result:
    """``ok`` false: the job failed on the device, and ``error`` says why."""

    ok: bool
    fields: Mapping[str, Any]
    blobs: tuple[bytes, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What must be equal for two latencies to be comparable. ``power``: the settings that make a processor fast or
    slow, empty where the system tells none."""

    target: str
    machine: str
    arch: str
    os: str
    runtime: str
    runtime_version: str
    provider: str
    precision: str
    threads: int
    protocol: str
    agent_sha256: str
    power: str = ""

    def digest(self) -> str:
        """Names the table. What is empty does not count, so that a new field makes no old table unknown."""
        known = {name: value for name, value in asdict(self).items() if value != ""}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: Fingerprint) -> str:
        """ "runtime_version '1.23' and '1.24', power '15W' and 'MAXN'"; empty when they are equal."""
        a, b = asdict(self), asdict(other)
        return ", ".join(f"{name} {a[name]!r} and {b[name]!r}" for name in a if a[name] != b[name])


class Device(ABC):
    """Something that runs jobs: this machine, one reached by ssh, a page in a browser. Close it, or use it as a context
    manager."""

    target: Target

    @property
    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """What it is. Raises DeviceError when it does not answer or lacks its runtime."""

    @abstractmethod
    def run(self, job: Job) -> Result:
        """One job's answer. Raises DeviceLostError when this job cost the device, DeviceError when the device is gone
        for good."""

    @abstractmethod
    def close(self) -> None: ...

    def show(self, done: float, total: float, what: str) -> None:  # noqa: B027
        """How far the work is, for a device that people look at."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def silent(text: str) -> None:
    """Says nothing."""


def agent_source() -> str:
    """The program that answers jobs: two files, sent as one text."""
    parts = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("agent.py", "agent_ort.py")]
    return "\n\n".join(parts) + "\n\nmain(JOBS)\n"


def agent_sha256(source: str) -> str:
    """Hash of the part of the agent that measures; the rest may change without making old rows incomparable."""
    begin, end = "# measurement protocol:", "# end of the measurement protocol"
    part = source[source.index(begin) : source.index(end)]
    return hashlib.sha256(part.encode()).hexdigest()[:16]
