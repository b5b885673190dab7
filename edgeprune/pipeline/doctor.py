"""What works here and what is missing, target by target, each with the command that mends it; and whether what was
measured once is still true."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.device import ortweb
from edgeprune.device.connect import connect
from edgeprune.device.target import Target, find_target, list_targets
from edgeprune.errors import EdgepruneError
from edgeprune.latency.recheck import Recheck, recheck
from edgeprune.latency.table import open_table

Callback = Callable[[float, float, str], None]

BUSY = 0.5  # load per core above which timings are disturbed


def _silent(done: float, total: float, what: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``mend``: the command or step that mends it, empty where nothing has to be done."""

    subject: str
    what: str
    ok: bool
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}

    def text(self) -> str:
        lines: list[str] = []
        for subject in dict.fromkeys(finding.subject for finding in self.findings):
            lines.append(subject)
            for finding in (f for f in self.findings if f.subject == subject):
                lines.append(f"  {'ok  ' if finding.ok else 'mend'}  {finding.what}: {finding.found}")
                if finding.mend:
                    lines.append(f"        -> {finding.mend}")
        return "\n".join(lines)


def check_table(
    *, target: str = "cpu", threads: int | None = None, on: str | None = None, progress: Callback = _silent
) -> Recheck:
    """Measure some kernels of a target's table again and say whether it is still true; the table stays as it is.

    Raises TableError when it is empty, DeviceError when the target is unknown or does not answer.
    """
    with connect(find_target(target, threads, on)) as device:
        table = open_table(device.fingerprint)
        return recheck(device, table, progress=lambda done, total: progress(done, total, "measuring kernels"))


def doctor(
    target: str | None = None, *, threads: int | None = None, on: str | None = None, progress: Callback = _silent
) -> Diagnosis:
    """Look at this machine and at one target, or at all: what was found, what is missing, what mends it.

    Raises DeviceError when there is no target of that name.
    """
    findings = list(_here())
    for name in [target] if target is not None else sorted(list_targets()):
        progress(0.0, 0.0, f"looking at {name}")
        try:
            wanted = find_target(name, threads, on if target is not None else None)
        except EdgepruneError as error:
            if name not in list_targets():
                raise
            findings.append(Finding(name, "target file", False, str(error), "mend the line that it names"))
            continue
        findings += _browser(wanted) if wanted.device == "browser" else _device(wanted)
    return Diagnosis(tuple(findings))


def _here() -> Sequence[Finding]:
    versions = ", ".join(f"{n} {_version(n)}" for n in ("torch", "onnxruntime", "onnx"))
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    load = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    governors = sorted(
        {p.read_text().strip() for p in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")}
    )
    steady = not governors or governors == ["performance"]
    return [
        Finding("this machine", "python", True, f"{python}; {versions}"),
        Finding(
            "this machine", "quiet", load <= BUSY, f"load {load:.2f} per core",
            "" if load <= BUSY else "end other programs before measuring on it: timings of a busy machine scatter",
        ),
        Finding(
            "this machine", "clock", steady, f"governor {', '.join(governors) or 'not told by the system'}",
            "" if steady else "sudo cpupower frequency-set -g performance",
        ),
    ]  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _device(target: Target) -> Sequence[Finding]:
    """Of a target that can be asked at once."""
    if target.device == "ssh":
        if shutil.which("ssh") is None:
            return [Finding(target.name, "ssh", False, "no ssh on this machine", "install OpenSSH's client")]
        if not target.host:
            command = f"edgeprune doctor --target {target.name} --on HOST"
            return [Finding(target.name, "host", False, "its file names none", command)]
    try:
        with connect(target) as device:
            fingerprint = device.fingerprint
            rows = len(open_table(fingerprint).rows)
    except EdgepruneError as error:
        return [Finding(target.name, "answers", False, str(error))]
    on = f" --on {target.host}" if target.host else ""
    return [
        Finding(
            target.name, "answers", True,
            f"{fingerprint.machine}; {fingerprint.runtime} {fingerprint.runtime_version}, {fingerprint.provider}, "
            f"{fingerprint.threads} thread{'s' if fingerprint.threads > 1 else ''}"
            + (f"; {fingerprint.power}" if fingerprint.power else ""),
        ),
        Finding(
            target.name, "table", True, f"{rows} kernels measured" if rows else "empty: the first run fills it",
            "" if rows else f"edgeprune profile --target {target.name}{on} --model MODEL",
        ),
    ]  # fmt: skip


def _browser(target: Target) -> Sequence[Finding]:
    """Of a target whose page somebody must open: what this end needs."""
    try:
        ortweb.files(target.runtime.provider)
        files = Finding(target.name, "runtime", True, ortweb.PACKAGE)
    except EdgepruneError as error:
        files = Finding(target.name, "runtime", False, str(error), f"edgeprune targets fetch {target.name}")
    code = importlib.util.find_spec("segno") is not None
    return [
        files,
        Finding(
            target.name, "QR code", True, "shown in the terminal" if code else "not shown: the address is",
            "" if code else "pip install 'edgeprune[web]'",
        ),
    ]  # fmt: skip
