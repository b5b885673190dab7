"""What the documents promise: commands parse, Python runs, links lead somewhere, a wheel carries its data."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.cli import EXIT_CODES, _parser

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def commands():
    for page in PAGES:
        for line in page.read_text().splitlines():
            line = line.strip().removeprefix("$ ").split("  #")[0]
            if line.startswith("edgeprune ") and "[" not in line and "COMMAND" not in line:
                yield pytest.param(line, id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("line", commands())
def test_commands_in_the_documents_parse(line):
    options = _parser().parse_args(shlex.split(line)[1:])
    assert callable(options.run)


def test_readme_python_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRUNE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    block = block.replace("(1, 3, 224, 224)", "(1, 3, 32, 32)").replace('latency="60%"', 'latency="80%", epochs=1')
    names = {"model": model, "batches": [torch.randn(8, 3, 32, 32) for _ in range(4)]}
    try:
        exec(block, names)
    except edgeprune.errors.BudgetMissedError:
        pytest.skip("this machine was too busy to measure")
    assert names["result"].report.ratio[0] < 0.9
    x = torch.randn(2, 3, 32, 32)
    again = edgeprune.load("retrained.pt2").module
    torch.testing.assert_close(again.eval()(x), names["network"].module.eval()(x))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_exit_codes_are_in_the_documents():
    text = (ROOT / "docs" / "commands.md").read_text()
    for code in re.findall(r"\b(\d+)  \w", EXIT_CODES):
        assert f"| {code} |" in text


def test_every_command_and_option_is_documented():
    text = (ROOT / "docs" / "commands.md").read_text()
    parser = _parser()
    (subparsers,) = [a for a in parser._actions if hasattr(a, "choices") and a.choices]
    for name, command in subparsers.choices.items():
        assert f"\n## {name}\n" in text
        for action in command._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--seed":
                    assert option in text, f"{name} {option}"
            assert action.help != "", f"{name} {action.dest} has no help"


def test_version_is_the_packages_and_in_the_changelog():
    assert f'version = "{edgeprune.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {edgeprune.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_packages_are_all_listed():
    text = (ROOT / "pyproject.toml").read_text()
    for init in (ROOT / "edgeprune").rglob("__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in text, f"{name} is missing in pyproject.toml: a wheel would lack it"


@pytest.mark.slow
def test_a_wheel_finds_its_targets(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "EDGEPRUNE_HOME": str(tmp_path / "home")}
    listed = subprocess.run(
        [sys.executable, "-m", "edgeprune", "targets"], env=environment, cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert str(tmp_path / "site") in listed.stdout
    assert listed.stdout.startswith("cpu")
    for name in ("browser.html", "browser.js"):
        assert (tmp_path / "site" / "edgeprune" / "device" / name).is_file()
