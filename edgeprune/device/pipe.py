"""PipeDevice: an agent process at the other end of a pipe.

Local and remote devices differ only in the command line that starts Python there, and in what its end may mean. Each
start begins with a handshake that tells whether it is still the same device; an agent that dies, hangs or talks
nonsense is a DeviceLostError, and the next job starts a fresh one.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from edgeprune.device.device import (
    PROTOCOL,
    AgentStartError,
    Device,
    DeviceChangedError,
    DeviceLostError,
    Fingerprint,
    Job,
    Result,
    Say,
    agent_sha256,
    agent_source,
    silent,
)
from edgeprune.device.target import Target
from edgeprune.errors import DeviceError

MAGIC = b"EPA1 "
HEADER_LIMIT = 64 << 20
START_LIMIT_S = 60.0
_CHUNK = 1 << 20
_LAST_WORDS = 60  # lines of stderr that are kept: ssh's warning of a wrong host key has 15


class _EndedError(DeviceLostError):
    """The agent closed its end."""


class PipeDevice(Device):
    """An agent on this machine. Use as a context manager, or call ``close``.

    ``argv`` starts a Python that executes its last argument as a program; ``say`` is told what is waited for.
    """

    def __init__(self, target: Target, argv: Sequence[str] | None = None, source: str | None = None, say: Say = silent):
        self.target = target
        self.source = agent_source() if source is None else source
        self.say = say
        self.where = f"target {target.name}"
        self._argv = list(argv) if argv is not None else [sys.executable, "-u", "-c"]
        self._process: subprocess.Popen[bytes] | None = None
        self._to = self._from = -1
        self._buffer = bytearray()
        self._said: collections.deque[str] = collections.deque(maxlen=_LAST_WORDS)
        self._listener: threading.Thread | None = None
        self._count = 0
        self._fingerprint: Fingerprint | None = None
        self._closed = False

    @property
    def fingerprint(self) -> Fingerprint:
        if self._fingerprint is None:
            self._ready(START_LIMIT_S)
        assert self._fingerprint is not None
        return self._fingerprint

    def run(self, job: Job) -> Result:
        """Raises DeviceLostError when the agent dies, hangs beyond the job's time limit, or answers something else;
        DeviceChangedError when the device changed its power mode meanwhile."""
        self._ready(min(START_LIMIT_S, job.timeout_s))
        return self._ask(job)

    def close(self) -> None:
        self._closed = True
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        self._end(patience_s=2)

    # what another way to the device changes

    def _command(self, boot: str) -> Sequence[str]:
        """The command line that runs the Python program ``boot``."""
        return [*self._argv, boot]

    def _install_command(self) -> str:
        return f"{sys.executable} -m pip install {self.target.runtime.name}"

    def _verdict(self, where: str, error: DeviceLostError, code: int) -> DeviceError:
        """What to raise for an agent that was lost ``where`` and whose process ended with ``code``."""
        said = " ".join(self._said[-1].split())[:300] if self._said else ""
        return DeviceLostError(f"{where}: {error} (exit code {code}{'; ' + said if said else ''})")

    # starting and ending

    def _ready(self, limit_s: float) -> None:
        """Start an agent if none runs, and make sure that it and the device are what they were."""
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        if self._closed:
            raise DeviceError(f"{self.where} is closed; open it anew")
        try:
            self._start(time.monotonic() + limit_s)
            hello = self._ask(Job("hello", {"protocol": PROTOCOL}, timeout_s=limit_s))
            found = self._introduced(hello)
        except DeviceLostError as error:
            if type(error) is DeviceLostError:
                raise AgentStartError(str(error)) from None
            raise
        except BaseException:
            self._end()
            raise
        self._fingerprint = found

    def _start(self, deadline: float) -> None:
        text = self.source.encode()
        boot = "import sys;sys.path[:]=[p for p in sys.path if p]"  # nothing is imported from the folder it starts in
        command = self._command(f"{boot};exec(sys.stdin.buffer.read({len(text)}))")
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.target.runtime.threads)}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=environment, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise DeviceError(f"{self.where}: cannot start {command[0]}: {error}") from None
        self._buffer.clear()
        self._said.clear()
        self._to, self._from = _descriptor(self._process.stdin), _descriptor(self._process.stdout)
        self._listener = threading.Thread(target=_drain, args=(self._process.stderr, self._said), daemon=True)
        self._listener.start()
        try:
            self._send([text], deadline)
        except DeviceLostError as error:
            raise self._lost(error, "start") from None

    def _introduced(self, hello: Result) -> Fingerprint:
        """Raises DeviceError for an agent of another version, a missing runtime, and too few cores; DeviceChangedError
        when the device is not what it was."""
        runtime = self.target.runtime
        spoken = hello.fields.get("protocol")
        if spoken != PROTOCOL:
            raise DeviceError(
                f"{self.where}: its agent speaks protocol {spoken}, this edgeprune {PROTOCOL}; use the same version of "
                "edgeprune on both sides"
            )
        if not hello.ok:
            raise DeviceError(f"{self.where}: {hello.error}; install {runtime.name} there: {self._install_command()}")
        fields = hello.fields
        cores = fields.get("cores")
        if isinstance(cores, int) and runtime.threads > cores:
            raise DeviceError(f"{self.where}: {runtime.threads} threads asked; it has {cores} cores, ask for no more")
        found = Fingerprint(
            target=self.target.name,
            machine=str(fields.get("machine", "")),
            arch=str(fields.get("arch", "")),
            os=str(fields.get("os", "")),
            runtime=runtime.name,
            runtime_version=str(fields.get("runtime_version", "")),
            provider=runtime.provider,
            precision=runtime.precision,
            threads=runtime.threads,
            protocol=self.target.protocol.id,
            agent_sha256=agent_sha256(self.source),
            power=str(fields.get("power", "")),
        )
        if self._fingerprint is not None and found != self._fingerprint:
            raise self._changed(self._fingerprint.difference(found))
        return found

    def _changed(self, difference: str) -> DeviceChangedError:
        return DeviceChangedError(
            f"{self.where} changed while it measured: {difference}; set it back and give the same command again, "
            "what is measured is kept (as it is now, it gets a table of its own)"
        )

    def _ask(self, job: Job) -> Result:
        deadline = time.monotonic() + job.timeout_s
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
            raise self._lost(error, job.op) from None
        except BaseException:  # interrupted half-way through an answer: this pipe cannot be used again
            self._end()
            raise
        if answer.get("fault") == "disk":
            raise DeviceError(
                f"{self.where}: its disk is full: {answer.get('error')}; make room there and give the same command "
                "again, what is measured is kept"
            )
        power = answer.get("power", "")
        if self._fingerprint is not None and job.op != "hello" and power != self._fingerprint.power:
            self._end()
            raise self._changed(f"power {self._fingerprint.power!r} and {power!r}")
        return Result(bool(answer.get("ok")), answer, blobs, str(answer.get("error", "")))

    def _lost(self, error: DeviceLostError, op: str) -> DeviceError:
        """End the agent and say what that was."""
        ended = self._end(patience_s=3 if isinstance(error, _EndedError) else 0)
        return self._verdict(self.where if op in ("start", "hello") else f"{self.where}, {op}", error, ended)

    def _end(self, patience_s: float = 0) -> int:
        """Kill the agent, unless it ends by itself within ``patience_s``; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        if process.poll() is None:
            process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self._listener is not None:
            self._listener.join(0.5)
        return code

    # bytes

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
                        raise _EndedError("the agent ended before the job was sent") from None

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
            raise _EndedError("the agent ended without an answer")
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
                self._said.append(line.decode("utf-8", "replace"))
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
