"""The command line as a user meets it: real files, real measuring, exit codes, one-line errors, and kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgeprune.cli import EXIT_CODES, main
from edgeprune.errors import EdgepruneError


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32), Block(32))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model file, labelled data and a latency table of its own."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    net = Net().eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 24, 24),)), folder / "net.pt2")
    torch.save(net, folder / "pickled.pt")
    (folder / "empty.pt").write_bytes(b"")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 3, 24, 24)).astype(np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(folder / "data.npz", x=x, y=y)
    previous = os.environ.get("EDGEPRUNE_HOME")
    os.environ["EDGEPRUNE_HOME"] = str(folder / "home")
    yield folder
    os.environ.pop("EDGEPRUNE_HOME")
    if previous is not None:
        os.environ["EDGEPRUNE_HOME"] = previous


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def compress(capsys, place, *options):
    return run(capsys, "compress", place / "net.pt2", "--data", place / "data.npz", "--images", "32", *options)


def test_compress_writes_what_it_promises(capsys, place):
    out = place / "out"
    code, text, _ = compress(capsys, place, "--latency", "60%", "--epochs", "2", "--out", out, "--json")
    report = json.loads(text)
    assert code in (0, 9), text  # a busy machine may miss by measurement; everything else must hold
    assert report["met"] == (code == 0)
    assert {p.name for p in out.iterdir()} >= {"model.onnx", "model.pt2", "original.onnx", "plan.json", "report.json"}
    assert json.loads((out / "report.json").read_text())["ratio"] == report["ratio"]
    assert report["ratio"][0] < 0.8
    assert report["certificate"] < 1e-4
    assert report["verification"]["error"] < 1e-4
    assert report["after"]["params"] < report["before"]["params"]
    model = onnx.load(out / "model.onnx")
    assert not {n.op_type for n in model.graph.node} & {"BatchNormalization", "Identity", "Dropout"}
    assert str(place).encode() not in (out / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(1, 3, 24, 24)).astype(np.float32)
    expected = torch.export.load(out / "model.pt2").module()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], expected, rtol=1e-3, atol=1e-4)


def test_a_trained_further_network_exports_again(capsys, place):
    test_compress_writes_what_it_promises(capsys, place)
    program = torch.export.load(place / "out" / "model.pt2")
    module = program.module()
    with torch.no_grad():
        next(p for p in module.parameters() if p.dim() > 1).mul_(1.5)
    torch.export.save(torch.export.export(module, (torch.randn(1, 3, 24, 24),)), place / "retrained.pt2")
    code, text, _ = run(capsys, "export", place / "retrained.pt2", "--out", place / "retrained.onnx")
    assert code == 0, text
    x = np.random.default_rng(2).normal(size=(1, 3, 24, 24)).astype(np.float32)
    session = onnxruntime.InferenceSession(place / "retrained.onnx", providers=["CPUExecutionProvider"])
    expected = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x})[0], expected, rtol=1e-3, atol=1e-4)


def test_without_data_it_still_works_and_says_what_that_costs(capsys, place):
    out = place / "nodata"
    code, text, _ = run(capsys, "compress", place / "net.pt2", "--latency", "1.5x", "--planner", "flops", "--out", out)
    assert code in (0, 9), text
    assert "no --data" in text
    report = json.loads((out / "report.json").read_text())
    assert (report["method"], report["planner"]) == ("magnitude-in", "flops")


def test_an_unreachable_budget_names_the_smallest_latency(capsys, place):
    code, _, error = compress(capsys, place, "--latency", "0.1us", "--out", place / "never")
    assert code == 8, error
    assert "ask for --latency" in error
    assert not (place / "never" / "model.onnx").exists()


def test_profile_again_measures_nothing(capsys, place):
    code, text, _ = run(capsys, "profile", "--target", "cpu", "--model", place / "net.pt2", "--json")
    first = json.loads(text)
    assert (code, first["rows"] > 0) == (0, True)
    code, text, _ = run(capsys, "profile", "--target", "cpu", "--model", place / "net.pt2", "--json")
    again = json.loads(text)
    assert (code, again["measured"], again["networks"]) == (0, 0, 0)
    assert again["rows"] == first["rows"]


def test_inspect_shows_layers_groups_and_shares(capsys, place):
    code, text, _ = run(capsys, "inspect", place / "net.pt2")
    assert code == 0
    assert "blocks.0.conv1" in text
    code, text, _ = run(capsys, "inspect", place / "net.pt2", "--json")
    document = json.loads(text)
    assert sum(k["share"] for k in document["kernels"]) == pytest.approx(1)
    assert len(document["blocks"]) == 3
    assert {g["name"] for g in document["groups"]} >= {"stem", "blocks.0.conv1"}


def test_measure_one_file_against_itself(capsys, place):
    run(capsys, "export", place / "net.pt2", "--out", place / "net.onnx")
    code, text, _ = run(capsys, "measure", place / "net.onnx", place / "net.onnx", "--rounds", "10", "--json")
    assert code == 0
    value, low, high = json.loads(text)["networks"][1]["ratio"]
    assert low <= value <= high
    assert value == pytest.approx(1, abs=0.25)


def test_targets_lists_the_cpu(capsys):
    code, text, _ = run(capsys, "targets", "--json")
    assert code == 0
    assert "cpu" in {t["name"] for t in json.loads(text)["targets"]}


def test_methods_lists_what_each_needs(capsys):
    code, text, _ = run(capsys, "methods", "--json")
    assert code == 0
    listed = {(m["option"], m["name"]): m for m in json.loads(text)["methods"]}
    assert listed["--method", "magnitude"]["needs"] == "nothing"
    assert listed["--planner", "hbgts"]["needs"] == "unlabelled data"
    code, text, _ = run(capsys, "methods")
    assert code == 0
    lines = text.splitlines()
    assert [line for line in lines if line.endswith("NAME")] == ["--method NAME", "--planner NAME"]
    for option, name in listed:
        after = lines[lines.index(f"{option} NAME") :]
        assert any(line.split()[:1] == [name] for line in after)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("compress", "net.pt2", "--latency", "soon"), 2, "10ms"),
        (("compress", "net.pt2", "--latency", "50%", "--method", "luck"), 2, "known methods"),
        (("compress", "net.pt2", "--latency", "50%", "--planner", "luck"), 2, "known planners"),
        (("compress", "net.pt2", "--latency", "50%", "--planner", "hbgts"), 2, "--data"),
        (("compress", "net.pt2", "--latency", "50%", "--epochs", "1", "--minutes", "1"), 2, "exclude"),
        (("compress", "net.pt2", "--latency", "50%", "--normalize", "x"), 2, "imagenet"),
        (("compress", "missing.pt", "--latency", "50%"), 3, "missing.pt"),
        (("compress", "empty.pt", "--latency", "50%"), 3, "empty"),
        (("compress", "pickled.pt", "--latency", "50%"), 3, "--trust"),
        (("compress", "net.pt2", "--latency", "50%", "--data", "nowhere"), 5, "folder"),
        (("compress", "net.pt2", "--latency", "50%", "--target", "toaster"), 6, "toaster"),
        (("measure", "net.pt2"), 2, "export"),
        (("measure", "missing.onnx"), 2, "missing.onnx"),
        (("export", "net.pt2", "--out", "no/such/folder/x.onnx"), 2, "directory"),
        (("inspect", "pickled.pt"), 3, "--trust"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else None,
)
def test_errors_are_one_line_with_a_remedy_and_a_code(capsys, place, monkeypatch, arguments, code, words):
    monkeypatch.chdir(place)
    found, _, error = run(capsys, *arguments)
    assert found == code, error
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_errors_as_json(capsys, place, monkeypatch):
    monkeypatch.chdir(place)
    code, text, _ = run(capsys, "compress", "net.pt2", "--latency", "soon", "--json")
    assert json.loads(text)["exit_code"] == code == 2


def test_every_exit_code_is_documented():
    def codes(kind):
        yield kind.exit_code
        for child in kind.__subclasses__():
            yield from codes(child)

    for code in set(codes(EdgepruneError)):
        assert f"{code:>3}  " in EXIT_CODES.replace("exit codes:", "") or f" {code}  " in EXIT_CODES


def test_kill_9_after_the_cut_then_the_same_command_ends_as_if_nothing_had_happened(place):
    def command(out):
        return [
            sys.executable, "-m", "edgeprune", "compress", str(place / "net.pt2"), "--data", str(place / "data.npz"),
            "--images", "32", "--latency", "70%", "--epochs", "30", "--out", str(place / out), "--json",
        ]  # fmt: skip

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = place / "killed" / "work" / "shrunk.pt"
    deadline = time.monotonic() + 240
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "killed" / "model.onnx").exists()
    shutil.copytree(place / "killed" / "work", place / "whole" / "work")
    for path in (place / "whole" / "work").glob("training*"):
        path.unlink()
    results = {}
    for out in ("killed", "whole"):
        done = subprocess.run(command(out), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 9), done.stderr
        results[out] = torch.export.load(place / out / "model.pt2").state_dict
    assert results["killed"].keys() == results["whole"].keys()
    for name, value in results["whole"].items():
        torch.testing.assert_close(results["killed"][name], value, rtol=0, atol=0)


def test_doctor_tells_what_it_found_and_fails_for_what_was_asked(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "board.toml").write_text('device = "ssh"\n')
    assert main(["doctor", "--target", "board"]) == 6
    assert "edgeprune doctor --target board --on HOST" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"subject": "board", "what": "host", "ok": False}.items() <= next(
        f for f in findings if f["subject"] == "board"
    ).items()


def test_a_table_is_checked_and_an_empty_one_says_how_to_fill_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    assert main(["profile", "--check"]) == 7
    assert "edgeprune profile --target cpu --model MODEL" in capsys.readouterr().err
    assert main(["profile", "--check", "--model", "net.pt2"]) == 2
    assert "leave --model out" in capsys.readouterr().err
