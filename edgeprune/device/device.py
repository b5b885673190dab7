"""Device: runs jobs on a target through an agent process at the other end of a pipe.

Local and remote devices differ only in the command line that starts Python there. An answer with ``ok`` false is a
value (one bad kernel cannot end a sweep); an agent that dies, hangs or talks nonsense is a DeviceLostError, and the
next job starts a fresh one.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from edgeprune.device.target import Target
from edgeprune.errors import DeviceError

MAGIC = b"EPA1 "
HEADER_LIMIT = 64 << 20
_CHUNK = 1 << 20


class DeviceLostError(DeviceError):
    """The agent died, hung or answered nonsense during a job. A new one is started by the next job."""


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
    """What must be equal for two latencies to be comparable."""

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

    def digest(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Device(Protocol):
    """Something that runs jobs: this machine, one reached by ssh, a page in a browser. Close it, or use it as a context
    manager."""

    target: Target

    @property
    def fingerprint(self) -> Fingerprint:
        """What it is. Raises DeviceError when it does not answer or lacks its runtime."""

    def run(self, job: Job) -> Result:
        """One job's answer. Raises DeviceLostError when this job cost the device, DeviceError when the device is gone
        for good."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def agent_source() -> str:
    return (Path(__file__).with_name("agent.py")).read_text(encoding="utf-8")


def agent_sha256(source: str) -> str:
    """Hash of the part of the agent that measures; the rest may change without making old rows incomparable."""
    begin, end = "# measurement protocol:", "# end of the measurement protocol"
    part = source[source.index(begin) : source.index(end)]
    return hashlib.sha256(part.encode()).hexdigest()[:16]


class PipeDevice:
    """A device behind a child process. ``argv`` starts a Python that executes its last argument as a program.

    Use as a context manager, or call ``close``.
    """

    def __init__(self, target: Target, argv: Sequence[str] | None = None, source: str | None = None):
        self.target = target
        self.source = agent_source() if source is None else source
        self._argv = list(argv) if argv is not None else [sys.executable, "-u", "-c"]
        self._process: subprocess.Popen[bytes] | None = None
        self._to = self._from = -1
        self._buffer = bytearray()
        self._stderr: collections.deque[str] = collections.deque(maxlen=20)
        self._count = 0
        self._fingerprint: Fingerprint | None = None

    def __enter__(self) -> PipeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fingerprint(self) -> Fingerprint:
        """Asked from the agent once. Raises DeviceError when the runtime is missing there."""
        if self._fingerprint is None:
            runtime = self.target.runtime
            result = self.run(Job("hello", {}, timeout_s=60))
            if not result.ok:
                raise DeviceError(f"target {self.target.name}: {result.error}; install {runtime.name} on the device")
            self._fingerprint = Fingerprint(
                target=self.target.name,
                machine=str(result.fields["machine"]),
                arch=str(result.fields["arch"]),
                os=str(result.fields["os"]),
                runtime=runtime.name,
                runtime_version=str(result.fields["runtime_version"]),
                provider=runtime.provider,
                precision=runtime.precision,
                threads=runtime.threads,
                protocol=self.target.protocol.id,
                agent_sha256=agent_sha256(self.source),
            )
        return self._fingerprint

    def run(self, job: Job) -> Result:
        """Send one job and wait for its answer. Raises DeviceLostError when the agent dies, hangs beyond the job's
        time limit, or answers something else."""
        deadline = time.monotonic() + job.timeout_s
        self._start()
        self._count += 1
        runtime = self.target.runtime
        header = {
            **job.fields, "op": job.op, "id": self._count, "sizes": [len(blob) for blob in job.blobs],
            "threads": runtime.threads, "provider": runtime.provider,
        }  # fmt: skip
        try:
            self._send([MAGIC + json.dumps(header).encode() + b"\n", *job.blobs], deadline)
            answer = self._header(deadline)
            if answer.get("id") != self._count or not isinstance(answer.get("sizes"), list):
                raise DeviceLostError(f"the agent answered job {answer.get('id')!r}; expected {self._count}")
            blobs = tuple(self._take(int(size), deadline) for size in answer["sizes"])
        except DeviceLostError as error:
            tail = self._end()
            raise DeviceLostError(f"target {self.target.name}, {job.op}: {error}{tail}") from None
        except BaseException:  # interrupted half-way through an answer: this pipe cannot be used again
            self._end()
            raise
        return Result(bool(answer.get("ok")), answer, blobs, str(answer.get("error", "")))

    def close(self) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
        self._end()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        text = self.source.encode()
        boot = f"import sys;exec(compile(sys.stdin.buffer.read({len(text)}),'agent.py','exec'))"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.target.runtime.threads)}
        try:
            self._process = subprocess.Popen(
                [*self._argv, boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=environment, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise DeviceError(f"target {self.target.name}: cannot start {self._argv[0]}: {error}") from None
        self._buffer.clear()
        self._stderr.clear()
        self._to, self._from = _descriptor(self._process.stdin), _descriptor(self._process.stdout)
        threading.Thread(target=_drain, args=(self._process.stderr, self._stderr), daemon=True).start()
        try:
            self._send([text], time.monotonic() + 60)
        except DeviceLostError as error:
            raise DeviceLostError(f"target {self.target.name}: {error}{self._end()}") from None

    def _end(self) -> str:
        """Kill the agent; returns what it said last, for a message."""
        process, self._process = self._process, None
        if process is None:
            return ""
        if process.poll() is None:
            process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        last = " ".join(self._stderr[-1].split())[:300] if self._stderr else ""
        return f" (exit code {code}{'; ' + last if last else ''})"

    def _send(self, parts: Sequence[bytes], deadline: float) -> None:
        pipe = self._to
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_WRITE)
            for part in parts:
                view = memoryview(part)
                while view:
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        raise DeviceLostError("the agent does not read its input; it hangs")
                    try:
                        view = view[os.write(pipe, view[:_CHUNK]) :]
                    except BlockingIOError:
                        continue
                    except OSError:
                        raise DeviceLostError("the agent ended before the job was sent") from None

    def _receive(self, deadline: float) -> None:
        pipe = self._from
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise DeviceLostError("no answer in time; the agent hangs or the device is overloaded")
        try:
            data = os.read(pipe, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            raise DeviceLostError("the agent ended without an answer")
        self._buffer += data

    def _header(self, deadline: float) -> dict[str, Any]:
        """The next header; lines before it that are none (a login banner, a stray print) are kept as messages."""
        while True:
            end = self._buffer.find(b"\n")
            if end < 0:
                if len(self._buffer) > HEADER_LIMIT:
                    raise DeviceLostError("the agent answers without end; expected a header line")
                self._receive(deadline)
                continue
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if not line.startswith(MAGIC):
                self._stderr.append(line.decode("utf-8", "replace"))
                continue
            try:
                answer = json.loads(line[len(MAGIC) :])
            except ValueError:
                raise DeviceLostError(f"the agent answered nonsense: {line[:80]!r}") from None
            if not isinstance(answer, dict):
                raise DeviceLostError(f"the agent answered nonsense: {line[:80]!r}")
            return answer

    def _take(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size:
            self._receive(deadline)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


def _descriptor(stream: Any) -> int:
    number: int = stream.fileno()
    os.set_blocking(number, False)
    return number


def _drain(stream: Any, lines: collections.deque[str]) -> None:
    with contextlib.suppress(OSError, ValueError), stream:
        for line in stream:
            lines.append(line.decode("utf-8", "replace"))


def connect(target: Target) -> Device:
    """The device of a target. Raises DeviceError for a kind of connection that is not known."""
    if target.connection == "local":
        return PipeDevice(target)
    raise DeviceError(f"target {target.name}: connection {target.connection!r} is not known; expected 'local'")
