"""A real Chromium without a screen, driven through ChromeDriver's HTTP interface; and the real onnxruntime-web."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from edgeprune.device import ortweb
from edgeprune.errors import DeviceError

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--ignore-certificate-errors",
]  # fmt: skip
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

needs_chromium = pytest.mark.skipif(
    not BROWSER or not DRIVER, reason="needs Debian's chromium and chromium-driver on this machine"
)


def runtime_files(home: Path) -> None:
    """onnxruntime-web in $EDGEPRUNE_HOME = ``home``: that of the user, else fetched into the user's cache."""
    own = os.environ.get("EDGEPRUNE_HOME")
    with pytest.MonkeyPatch.context() as patch:
        if own and Path(own) != home:
            patch.setenv("EDGEPRUNE_HOME", own)
        else:
            patch.delenv("EDGEPRUNE_HOME", raising=False)
        try:
            ortweb.files("wasm")
        except DeviceError:
            try:
                ortweb.fetch()
            except DeviceError as error:
                pytest.skip(f"onnxruntime-web cannot be fetched here: {error}")
        source = ortweb.folder()
    (home / "onnxruntime-web").mkdir(parents=True, exist_ok=True)
    (home / "onnxruntime-web" / ortweb.VERSION).symlink_to(source)


class Browser:
    """One Chromium; ``kill`` ends it at once, as a crash does."""

    def __init__(self, *more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.profile = tempfile.mkdtemp(prefix="edgeprune-chromium-")
        self.driver = subprocess.Popen(
            [DRIVER, f"--port={self.port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        options = {"binary": BROWSER, "args": [*ARGUMENTS, *more, f"--user-data-dir={self.profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "acceptInsecureCerts": True}}}
        deadline = time.monotonic() + 60
        while True:
            try:
                self.session = self._send("POST", "/session", wanted)["sessionId"]
                return
            except OSError:
                if time.monotonic() > deadline:
                    self.kill()
                    raise
                time.sleep(0.2)

    def _send(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def command(self, path: str, body: dict | None = None, method: str = "POST"):
        return self._send(method, f"/session/{self.session}{path}", body if method == "GET" else body or {})

    def open(self, url: str) -> None:
        self.command("/url", {"url": url})

    def reload(self) -> None:
        self.command("/refresh")

    def script(self, code: str):
        return self.command("/execute/sync", {"script": code, "args": []})

    def text(self, element: str) -> str:
        return self.script(f"return document.getElementById({element!r}).textContent")

    def wait(self, element: str, words: str, seconds: float = 30) -> str:
        deadline = time.monotonic() + seconds
        while words not in (found := self.text(element)):
            assert time.monotonic() < deadline, f"{element} says {found!r}, not {words!r}"
            time.sleep(0.05)
        return found

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.driver.pid, 9)
        self.driver.wait()
        shutil.rmtree(self.profile, ignore_errors=True)
