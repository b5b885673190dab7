"""BrowserDevice: a page that somebody opens, on a phone or here, runs the jobs with onnxruntime-web.

edgeprune serves the page; the page asks for jobs. It may be reloaded, hidden, locked away or killed: a job waits for it
and is handed out again. Only when it stays away longer than the target's ``patience_s`` does the command end, and then
the same command goes on with the rest. A job is to blame only when the page was there and did not answer in time, or
went away during it again and again.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeprune.device import ortweb
from edgeprune.device.browser_server import PageServer
from edgeprune.device.desk import Desk, Task
from edgeprune.device.device import Device, DeviceLostError, Fingerprint, Job, Result, agent_sha256
from edgeprune.device.target import Target
from edgeprune.errors import DeviceError

COARSE_CLOCK_US = 50.0  # above, single kernels cannot be told
DEATHS = 3  # so many pages that fetched a job and went away: the job is at fault
FAREWELL_S = 2.0
TICK_S = 0.25


class BrowserDevice(Device):
    """Use as a context manager, or call ``close``. ``tell`` shows lines to whoever can open a page.

    Raises DeviceError when onnxruntime-web is not there or the address cannot be had.
    """

    def __init__(self, target: Target, tell: Callable[[str], None] | None = None):
        self.target = target
        self.tell = tell or _to_terminal
        self.where = f"target {target.name}"
        self._count = 0
        self._fingerprint: Fingerprint | None = None
        self._clock_us = 0.0
        self._failed = ""
        self._begun: tuple[str, float] = ("", 0.0)
        self._desk = Desk(self._accept)
        self._server = self._serve()
        self._shown = False

    def _serve(self) -> PageServer:
        target, here = self.target, Path(__file__).parent
        files = {"": here / "browser.html", "browser.js": here / "browser.js"}
        files |= {f"ort/{path.name}": path for path in ortweb.files(target.runtime.provider)}
        host = target.host or "127.0.0.1"
        host, _, port = host.partition(":") if host.count(":") == 1 else (host, "", "")
        try:
            if ipaddress.ip_address(host).is_unspecified:
                raise DeviceError(f"{self.where}: {host} is every interface; give the address of the one to serve on")
        except ValueError:
            pass  # a name
        if not host or (port and not port.isdecimal()):
            raise DeviceError(f"{self.where}: {target.host!r} is no address; expected ADDRESS or ADDRESS:PORT")
        token = secrets.token_urlsafe(16)
        settings = {"provider": target.runtime.provider, "threads": target.runtime.threads}
        tls = _tls(target)
        address = (host, int(port) if port else target.port)
        try:
            server = PageServer(address, token, files, self._desk, settings, tls)
        except (OSError, OverflowError) as error:
            raise DeviceError(
                f"{self.where}: cannot serve on {host}:{address[1]} ({error}); give an address of this machine with "
                "--listen ADDRESS[:PORT]"
            ) from None
        if ipaddress.ip_address(str(server.server_address[0])).is_unspecified:
            server.server_close()
            raise DeviceError(f"{self.where}: {host} is every interface; give the address of the one to serve on")
        self.url = f"{'https' if tls else 'http'}://{host}:{server.server_address[1]}/{token}/"
        return server

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the first page that was opened; pages of another one are refused from then on. Raises DeviceError when
        none is opened, or its browser cannot run the runtime."""
        with self._desk.changed:
            self._wait(lambda: self._fingerprint is not None or bool(self._failed))
        if self._fingerprint is None:
            raise DeviceError(f"{self.where}: {self._failed}")
        return self._fingerprint

    def run(self, job: Job) -> Result:
        """Lay a job down and wait for its answer, as long as the page is there or may come back.

        Raises DeviceLostError when the page works on it for longer than its time limit, or dies of it; DeviceError when
        no page comes for ``patience_s``.
        """
        _ = self.fingerprint
        if job.op == "kernels" and self.target.runtime.provider == "webgpu":
            raise DeviceError(
                f"{self.where}: WebGPU does not tell the time of single kernels; time whole networks with `edgeprune "
                f"measure A.onnx B.onnx --target {self.target.name}`"
            )
        if job.op == "kernels" and self._clock_us > COARSE_CLOCK_US:
            raise DeviceError(
                f"{self.where}: the page's clock has steps of {self._clock_us:g} us, too coarse for single kernels; "
                "open it by https or as localhost: see docs/targets.md"
            )
        self._count += 1
        header = {**job.fields, "op": job.op, "id": self._count}
        task = Task(self._count, (header, tuple(job.blobs)))
        desk = self._desk
        desk.lay(task)
        try:
            with desk.changed:
                self._wait(lambda: task.answer is not None, task, job.timeout_s)
        except DeviceLostError as error:
            raise DeviceLostError(f"{self.where}, {job.op}: {error}") from None
        finally:
            desk.lay(None)
        assert task.answer is not None
        fields, blobs = task.answer
        return Result(bool(fields.get("ok")), fields, blobs, str(fields.get("error", "")))

    def show(self, done: float, total: float, what: str) -> None:
        """How far the work is, for the page."""
        stage, begun = self._begun
        if what != stage:
            begun = time.monotonic()
            self._begun = (what, begun)
        spent = time.monotonic() - begun
        left = spent * (total - done) / done if done > 0 and spent > 2 else None
        self._desk.progress = {"done": done, "total": total, "what": what, "left_s": left}

    def close(self) -> None:
        self._desk.finish(FAREWELL_S)
        self._server.shutdown()
        self._server.server_close()

    def _wait(self, done: Callable[[], bool], task: Task | None = None, limit_s: float = 0.0) -> None:
        """Hold the desk until ``done``. Time runs against the job while its page is there and in front, and against
        our patience while it is not."""
        desk, patience_s = self._desk, self.target.patience_s
        working = away = 0.0
        before = time.monotonic()
        mentioned = False
        if not self._shown:
            self._shown = True
            self._invite()
            mentioned = True
        while not done():
            desk.changed.wait(TICK_S)
            now = time.monotonic()
            spent, before = now - before, now
            if desk.present and not desk.hidden:
                away, mentioned = 0.0, False
                if task is not None and task.pages and task.pages[-1] == desk.page:
                    working += spent
            elif not done():
                away += spent
            if task is not None and working > limit_s:
                raise DeviceLostError("no answer in time; the page hangs or the device is overloaded")
            if task is not None and len(set(task.pages)) >= DEATHS and not desk.present:
                raise DeviceLostError(f"the page went away {DEATHS} times during this job")
            if away > patience_s:
                raise DeviceError(
                    f"{self.where}: no page answered for {away:.0f} s; start the same command again, it goes on with "
                    "what is finished, and open the address that it prints"
                )
            if away > 0 and not mentioned:
                mentioned = True
                why = "is hidden or locked" if desk.present else "does not answer"
                self.tell(f"the page {why}; open {self.url} again or bring it to the front, and the work goes on")

    def _invite(self) -> None:
        target = self.target
        self.tell(f"open this address in the browser to measure ({target.runtime.threads} threads):\n  {self.url}")
        if code := _qr_code(self.url):
            self.tell(code)
        if self.url.startswith("http:") and not _is_loopback(self.url):
            self.tell(
                "  by http from another device its clock is too coarse for single kernels; see docs/targets.md on https"
            )

    def _accept(self, hello: Mapping[str, Any]) -> str:
        """Called when a page arrives: why it is refused, or nothing."""
        if not hello.get("ok"):
            self._failed = str(hello.get("error", "the page failed without a word"))
            return ""
        found = self._identify(hello)
        if self._fingerprint is not None and found != self._fingerprint:
            return "This is another browser or device than the one the measurement began with; go on there."
        self._fingerprint, self._failed = found, ""
        self._clock_us = float(hello.get("clock_us", 0.0))
        return ""

    def _identify(self, hello: Mapping[str, Any]) -> Fingerprint:
        runtime = self.target.runtime

        def text(name: str) -> str:
            return str(hello.get(name) or "")

        parts = [text("model"), text("browser") or text("agent"), f"{hello.get('cores')} cores", text("gpu")]
        if hello.get("memory_gb"):
            parts.append(f"{hello['memory_gb']} GB")
        return Fingerprint(
            target=self.target.name,
            machine=", ".join(part for part in parts if part),
            arch=text("arch") or text("platform"),
            os=text("platform"),
            runtime=runtime.name,
            runtime_version=text("runtime_version"),
            provider=runtime.provider,
            precision=runtime.precision,
            threads=int(hello.get("threads") or 0),
            protocol=self.target.protocol.id,
            agent_sha256=agent_sha256(_worker_source()),
        )


def _worker_source() -> str:
    """The worker's measuring part is what ``agent_sha256`` looks for; comments differ between the languages."""
    source = Path(__file__).with_name("browser.js").read_text(encoding="utf-8")
    return re.sub(r"^// ", "# ", source, flags=re.MULTILINE)


def _tls(target: Target) -> ssl.SSLContext | None:
    if not target.certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(
            Path(target.certificate).expanduser(), Path(target.key).expanduser() if target.key else None
        )
    except (OSError, ssl.SSLError) as error:
        raise DeviceError(
            f"target {target.name}: cannot use certificate {target.certificate!r} and key {target.key!r} ({error}); "
            "expected two PEM files: see docs/targets.md"
        ) from None
    return context


def _qr_code(text: str) -> str:
    """For a terminal; empty without the library ``segno``."""
    try:
        import segno
    except ImportError:
        return ""
    import io

    out = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(out=out, compact=True)
    return out.getvalue().rstrip("\n")


def _is_loopback(url: str) -> bool:
    host = re.sub(r"^\w+://|[:/].*$", "", url)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _to_terminal(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
