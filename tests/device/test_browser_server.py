"""The web server and the desk against a page played by hand: who is let in, what is served, which answer counts."""

import dataclasses
import http.client
import json
import threading
import time
import urllib.parse

import pytest

from edgeprune.device import browser as module
from edgeprune.device import desk as desk_module
from edgeprune.device import ortweb
from edgeprune.device.browser import BrowserDevice
from edgeprune.device.browser_server import pack, unpack
from edgeprune.device.device import DeviceLostError, Job
from edgeprune.device.target import Runtime, Target
from edgeprune.errors import DeviceError

TARGET = Target("web", device="browser", patience_s=1.5, runtime=Runtime("onnxruntime-web", "wasm"))
HELLO = {"ok": True, "browser": "Nobody 1", "platform": "Test", "cores": 4, "memory_gb": 0, "runtime_version": "9.9",
         "threads": 1, "clock_us": 5}  # fmt: skip


class Page:
    """What browser.html says over the wire."""

    def __init__(self, device, name="page-1", hello=HELLO):
        self.url = urllib.parse.urlsplit(device.url)
        self.name = name
        if hello:
            assert self.hello(hello)[0] == 200

    def send(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=20)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def ask(self, name, body=None):
        return self.send("POST" if body is not None else "GET", f"{self.url.path}{name}?page={self.name}", body)

    def hello(self, hello=HELLO):
        return self.ask("hello", pack(hello))

    def job(self):
        status, body, _ = self.ask("job")
        return unpack(body) if status == 200 else status

    def result(self, fields, blobs=()):
        status, body, _ = self.ask("result", pack(fields, blobs))
        return json.loads(body)["taken"] if status == 200 else status

    def alive(self, job=0, hidden=False):
        return json.loads(self.ask("alive", json.dumps({"job": job, "hidden": hidden}).encode())[1])


@pytest.fixture
def said():
    return []


@pytest.fixture
def device(monkeypatch, said):
    monkeypatch.setattr(ortweb, "files", lambda provider: [])
    monkeypatch.setattr(module, "FAREWELL_S", 0.0)
    with BrowserDevice(TARGET, said.append) as opened:
        yield opened


class Running:
    """A job in a thread of its own, as the device's user waits for it."""

    def __init__(self, device, job):
        self.result = self.error = None
        self.thread = threading.Thread(target=self._run, args=(device, job), daemon=True)
        self.thread.start()

    def _run(self, device, job):
        try:
            self.result = device.run(job)
        except DeviceError as error:
            self.error = error

    def join(self, seconds=15):
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        return self


@pytest.mark.parametrize(
    "path",
    ["/", "/wrong/", "/wrong/job", "/favicon.ico", "/wrong/../{token}/", "/{token}", "/{short}/", ""],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_the_token_nothing_is_told(device, path, method):
    page = Page(device, hello=None)
    token = page.url.path.strip("/")
    status, body, _ = page.send(
        method, path.format(token=token, short=token[:-1]) or "*", b"" if method == "POST" else None
    )
    assert status == 403
    assert token.encode() not in body


@pytest.mark.parametrize(
    "name",
    ["../agent.py", "..%2fagent.py", "%2e%2e/agent.py", "agent.py", "ort/", "ort", "ort/../browser.js", "browser.js/",
     "/etc/passwd", "ort//etc/passwd", "index.html", "ort/..%5c..%5cx"],
)  # fmt: skip
def test_nothing_but_the_listed_names_is_served(device, name):
    page = Page(device, hello=None)
    assert page.send("GET", page.url.path + name)[0] == 404


def test_the_page_is_isolated_and_never_kept(device):
    page = Page(device, hello=None)
    for name, kind in (("", "text/html; charset=utf-8"), ("browser.js", "text/javascript")):
        status, body, headers = page.send("GET", page.url.path + name)
        assert (status, headers["Content-Type"]) == (200, kind)
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert headers["Cache-Control"] == "no-store"
        assert "Python" not in headers["Server"]
        assert len(body) > 1000


def test_every_device_has_a_token_of_its_own(device, monkeypatch):
    with BrowserDevice(TARGET, lambda text: None) as other:
        assert len(urllib.parse.urlsplit(device.url).path) > 20
        assert other.url.rsplit("/", 2)[1] != device.url.rsplit("/", 2)[1]


def test_the_fingerprint_is_the_pages(device):
    Page(device)
    found = device.fingerprint
    assert (found.machine, found.os, found.runtime_version) == ("Nobody 1, 4 cores", "Test", "9.9")
    assert (found.provider, found.threads) == ("wasm", 1)


def test_a_job_goes_out_and_its_answer_comes_in_once(device):
    page = Page(device)
    running = Running(device, Job("run", {"a": [1]}, [b"xy", b"", b"z"]))
    fields, blobs = page.job()
    assert (fields["op"], fields["a"], blobs) == ("run", [1], (b"xy", b"", b"z"))
    assert page.result({"ok": True, "id": fields["id"] + 1}) is False
    assert page.result({"ok": True, "id": fields["id"], "b": 2}, (b"first",)) is True
    assert page.result({"ok": True, "id": fields["id"], "b": 3}, (b"second",)) is False
    result = running.join().result
    assert (result.ok, result.fields["b"], result.blobs) == (True, 2, (b"first",))
    assert page.result({"ok": True, "id": fields["id"]}) is False


def test_a_reloaded_page_gets_the_same_job_and_the_old_one_stops(device):
    old = Page(device)
    running = Running(device, Job("run", {}))
    fields, _ = old.job()
    new = Page(device, "page-2")
    assert old.job() == 409
    assert old.result({"ok": True, "id": fields["id"]}) == 409
    assert new.job()[0]["id"] == fields["id"]
    assert new.job()[0]["id"] == fields["id"]  # its answer was lost on the way: it asks again
    assert new.result({"ok": True, "id": fields["id"]}) is True
    assert running.join().result.ok


def test_another_browser_is_refused_once_rows_may_exist(device):
    first = Page(device)
    other = Page(device, "page-2", hello=None)
    status, body, _ = other.hello({**HELLO, "browser": "Nobody 2"})
    assert status == 409
    assert b"another browser" in body
    Running(device, Job("run", {}))
    assert first.job()[0]["op"] == "run"


def test_a_failed_job_is_a_value(device):
    page = Page(device)
    running = Running(device, Job("run", {}))
    page.result({"ok": False, "error": "no such operator", "id": page.job()[0]["id"]})
    result = running.join().result
    assert (result.ok, result.error) == (False, "no such operator")


def test_a_browser_that_cannot_run_it_says_why(device):
    Page(device, hello={"ok": False, "error": "no WebAssembly"})
    with pytest.raises(DeviceError, match="no WebAssembly"):
        device.fingerprint  # noqa: B018


def test_time_runs_only_while_the_page_is_there_and_in_front(device, said, monkeypatch):
    monkeypatch.setattr(desk_module, "SILENT_S", 0.5)
    page = Page(device)
    running = Running(device, Job("run", {}, timeout_s=0.6))
    job = page.job()[0]["id"]
    begin = time.monotonic()
    while time.monotonic() - begin < 1.0:  # hidden, longer than the job's limit, shorter than our patience
        assert page.alive(job, hidden=True)["cancel"] == 0
        time.sleep(0.05)
    assert running.thread.is_alive()
    while running.thread.is_alive() and time.monotonic() - begin < 10:
        page.alive(job)
        time.sleep(0.05)
    error = running.join().error
    assert isinstance(error, DeviceLostError)
    assert "no answer in time" in str(error)
    assert page.alive(job)["cancel"] == job
    assert any("hidden" in line for line in said)


def test_a_page_that_stays_away_ends_the_command_with_what_to_do(device, said, monkeypatch):
    monkeypatch.setattr(desk_module, "SILENT_S", 0.3)
    page = Page(device)
    running = Running(device, Job("run", {}))
    page.job()
    error = running.join().error
    assert not isinstance(error, DeviceLostError)  # no kernel is to blame
    assert "same command" in str(error)
    assert any("does not answer" in line and device.url in line for line in said)


def test_a_page_that_comes_back_in_time_goes_on(device, monkeypatch):
    monkeypatch.setattr(desk_module, "SILENT_S", 0.3)
    page = Page(device)
    running = Running(device, Job("run", {}))
    page.job()
    time.sleep(1.0)
    again = Page(device, "page-2")
    assert again.result({"ok": True, "id": again.job()[0]["id"]}) is True
    assert running.join().result.ok


def test_a_job_that_kills_every_page_is_to_blame(device, monkeypatch):
    monkeypatch.setattr(desk_module, "SILENT_S", 0.3)
    running = Running(device, Job("run", {}))
    for number in range(3):
        page = Page(device, f"page-{number}")
        page.job()
        time.sleep(0.6)
    error = running.join().error
    assert isinstance(error, DeviceLostError)
    assert "3 times" in str(error)


def test_a_coarse_clock_measures_no_single_kernel(device):
    Page(device, hello={**HELLO, "clock_us": 100})
    with pytest.raises(DeviceError, match="100 us.*https"):
        device.run(Job("kernels", {}))


def test_webgpu_measures_no_single_kernel(device):
    Page(device)
    device.target = dataclasses.replace(TARGET, runtime=Runtime("onnxruntime-web", "webgpu"))
    with pytest.raises(DeviceError, match="edgeprune measure"):
        device.run(Job("kernels", {}))


def test_the_address_is_told_with_a_code_to_scan(device, said):
    Page(device)
    assert device.fingerprint.threads == 1
    assert device.url in said[0]
    code = [line for line in said if "\u2588" in line]
    try:
        import segno  # noqa: F401
    except ImportError:
        assert not code
    else:
        assert len(set(map(len, code[0].splitlines()))) == 1  # a square of blocks
        assert len(code[0].splitlines()) > 10


def test_closing_tells_the_page(device):
    page = Page(device)
    found = []
    thread = threading.Thread(target=lambda: found.append(page.job()))
    thread.start()
    time.sleep(0.3)
    device._desk.finish(2.0)
    thread.join(5)
    assert found == [410]


def test_progress_reaches_the_page(device):
    page = Page(device)
    device.show(3, 12, "measuring kernels")
    told = page.alive()["progress"]
    assert (told["done"], told["total"], told["what"]) == (3, 12, "measuring kernels")


@pytest.mark.parametrize(
    "body", [b"", b"EPA1 {}", b"EPA1 {}\n", b'EPA1 {"sizes": [3]}\nxx', b'EPA1 {"sizes": "x"}\n', b"{}\n"]
)
@pytest.mark.parametrize("name", ["hello", "result"])
def test_nonsense_is_refused(device, body, name):
    page = Page(device)
    assert page.ask(name, body)[0] == 400
    assert page.ask("alive", b"[]")[0] == 400


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "203.0.113.7", "no.such.host.invalid", "127.0.0.1:x", ":8000", "0", "0:8000"]
)
def test_only_an_address_of_this_machine_is_served_on(monkeypatch, host):
    monkeypatch.setattr(ortweb, "files", lambda provider: [])
    with pytest.raises(DeviceError) as error:
        BrowserDevice(TARGET.on(host))
    assert "\n" not in str(error.value)
    assert "address" in str(error.value)


def test_a_broken_certificate_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(ortweb, "files", lambda provider: [])
    (tmp_path / "c.pem").write_text("nothing")
    with pytest.raises(DeviceError, match="PEM"):
        BrowserDevice(Target("web", device="browser", certificate=str(tmp_path / "c.pem")))
