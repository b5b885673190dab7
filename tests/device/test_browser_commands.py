"""profile, measure and compress on a browser's WebAssembly, as a user starts them: the page reloaded and the browser
killed in the middle, and no row lost or twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from chromium import Browser, needs_chromium, runtime_files
from torch import nn

from edgeprune.cli import main

pytestmark = needs_chromium

QUICK = """
description = "a quick web-wasm"
device = "browser"
patience_s = {patience}
[runtime]
name = "onnxruntime-web"
provider = "wasm"
[protocol]
id = "quick"
warmup_ms = 10
kernel_ms = 10
batch_ms = 0.5
rounds = 5
round_ms = 15
evict_mb = 4
repeats = 0
[fusion]
block = 0
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser-home")
    runtime_files(folder)
    (folder / "targets").mkdir()
    (folder / "targets" / "quick.toml").write_text(QUICK.format(patience=60))
    (folder / "targets" / "hasty.toml").write_text(QUICK.format(patience=25))
    torch.manual_seed(0)
    net = Net().eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 48, 48),)), folder / "net.pt2")
    return folder


class Command:
    """``edgeprune ARGUMENTS`` in a process of its own, and the address that it prints."""

    def __init__(self, home: Path, *arguments: str):
        environment = {**os.environ, "EDGEPRUNE_HOME": str(home)}
        self.log = home / f"log-{time.monotonic_ns()}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgeprune", *arguments, "--json"],
                stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://\S+/", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "no address was printed"
            time.sleep(0.1)
        self.url = found[0]

    def end(self, seconds: float = 200) -> tuple[int, dict]:
        """(exit code, what --json printed)."""
        try:
            out, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(self.log.read_text()) from None
        return self.process.returncode, json.loads(out)


@pytest.fixture
def browser():
    opened = Browser()
    yield opened
    opened.kill()


def rows(home: Path, target: str) -> Counter:
    """Keys in the target's tables."""
    found: Counter = Counter()
    for path in (home / "profiles" / target).glob("*.jsonl"):
        for line in path.read_text().splitlines():
            document = json.loads(line)
            if document.get("kind") == "kernel":
                assert not document["error"], document
                found[document["key"]] += 1
    return found


def wait_for_rows(home: Path, target: str, more_than: int) -> int:
    deadline = time.monotonic() + 90
    while (count := sum(rows(home, target).values())) <= more_than:
        assert time.monotonic() < deadline, "no row came"
        time.sleep(0.05)
    return count


@pytest.mark.slow
def test_profile_with_reloads_then_measure_then_compress(home, browser):
    profile = Command(home, "profile", "--target", "quick", "--model", str(home / "net.pt2"))
    browser.open(profile.url)
    had = 0
    for _ in range(2):
        had = wait_for_rows(home, "quick", had)
        assert profile.process.poll() is None
        browser.reload()
    code, document = profile.end()
    assert code == 0, profile.log.read_text()
    browser.wait("state", "Finished")
    found = rows(home, "quick")
    assert set(found.values()) == {1}
    assert document["measured"] == len(found)

    again = Command(home, "profile", "--target", "quick", "--model", str(home / "net.pt2"))
    browser.open(again.url)
    code, document = again.end()
    assert (code, document["measured"]) == (0, 0)

    out = home / "out"
    compress = Command(
        home,
        "compress",
        str(home / "net.pt2"),
        "--target",
        "quick",
        "--latency",
        "80%",
        "--minutes",
        "0",
        "--out",
        str(out),
    )
    browser.open(compress.url)
    code, document = compress.end()
    assert code in (0, 9), compress.log.read_text()  # a busy machine may say that it missed
    assert set(rows(home, "quick").values()) == {1}
    assert (out / "model.onnx").stat().st_size < (out / "original.onnx").stat().st_size

    measure = Command(
        home, "measure", "--target", "quick", "--rounds", "5", str(out / "original.onnx"), str(out / "model.onnx")
    )
    browser.open(measure.url)
    code, document = measure.end()
    assert code == 0
    original, smaller = (one["median_ms"] for one in document["networks"])
    assert smaller < original


@pytest.mark.slow
def test_a_killed_browser_ends_the_command_and_the_same_one_goes_on(home, browser):
    first = Command(home, "profile", "--target", "hasty", "--model", str(home / "net.pt2"))
    browser.open(first.url)
    wait_for_rows(home, "hasty", 0)
    browser.kill()
    code, document = first.end(90)
    assert code == 6
    assert "no page answered" in document["message"]
    assert "same command" in document["message"]
    assert "does not answer; open http://" in first.log.read_text()
    had = rows(home, "hasty")
    second = Command(home, "profile", "--target", "hasty", "--model", str(home / "net.pt2"))
    other = Browser()
    try:
        other.open(second.url)
        wait_for_rows(home, "hasty", len(had))
    finally:
        other.kill()
        os.killpg(second.process.pid, signal.SIGKILL)
        second.process.communicate()
    found = rows(home, "hasty")
    assert set(found) > set(had)
    assert set(found.values()) == {1}


def test_without_the_files_the_command_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    assert main(["profile", "--target", "web-wasm"]) == 6
    assert "edgeprune targets fetch web-wasm" in capsys.readouterr().err


def test_fetch_of_a_target_that_needs_nothing(capsys):
    assert main(["targets", "fetch", "cpu"]) == 2
    assert "web-wasm" in capsys.readouterr().err
