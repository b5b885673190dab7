"""Target: a class of hardware and how it is measured, read from a TOML file.

Files are looked for in the user's own directory first ($EDGEPRUNE_HOME, else ~/.config/edgeprune), then in the
checkout's ``targets/``, then in the package data of a wheel.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Runtime:
    """What executes the network. ``threads`` is part of the fingerprint: rows of 1 and 4 threads never mix."""

    name: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    precision: str = "fp32"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Protocol:
    """How long things are measured. A change of ``id`` starts a new latency table.

    warmup_ms:        runs before the first sample, of a batch of kernels and of a network
    kernel_ms:        measuring time of one batch of kernels per repetition
    batch_ms:         kernels are batched until one run of the batch is expected to take this long
    rounds:           interleaved rounds over whole networks
    round_ms:         measuring time of one network in one round
    evict_mb:         read between two runs of a batch, so that weights come from main memory as in a large network
    drift:            a batch whose reference kernel is slower than the session's best by this share is repeated
    repeats:          how often a batch is repeated at most because of drift
    """

    id: str = "ep-lat-1"
    warmup_ms: float = 10.0
    kernel_ms: float = 30.0
    batch_ms: float = 3.0
    rounds: int = 15
    round_ms: float = 20.0
    evict_mb: float = 32.0
    drift: float = 0.10
    repeats: int = 2


@dataclass(frozen=True, slots=True)
class Fusion:
    """What the runtime fuses and which tensor layout it works in; see latency/fusion.py.

    block:      channels per block of the runtime's own layout (16 with AVX-512, 8 with AVX2), 0 if it has none
    conv_tail:  activations fused into a convolution
    gemm_tail:  activations fused into a matrix product
    blocked:    element-wise operators that can stay in the blocked layout
    """

    block: int = 16
    conv_tail: tuple[str, ...] = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish")
    gemm_tail: tuple[str, ...] = (
        "Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Elu", "Softplus", "Softsign", "ThresholdedRelu",
        "Selu", "Clip",
    )  # fmt: skip
    blocked: tuple[str, ...] = ("Relu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish", "Add", "Mul", "Sum")


@dataclass(frozen=True, slots=True)
class Target:
    """
    device:      "local", "ssh" or "browser"
    host:        of an ssh device: HOST, USER@HOST, USER@HOST:PORT, a name in ssh's own configuration; several, parted
                 by commas, share the work. Of a browser device: the address to serve the page on, ADDRESS or
                 ADDRESS:PORT
    user, port:  for hosts that do not tell their own; the page's port, 0 for any that is free
    python:      the interpreter there
    ssh_options: further options of ssh, "Key=value"
    ssh_config:  a configuration file of ssh, instead of the user's own
    certificate: of a browser device: PEM file, for https; ``key`` its private key, where that is another file
    patience_s:  of a browser device: how long a page may stay away
    """

    name: str
    description: str = ""
    device: str = "local"
    host: str = ""
    user: str = ""
    port: int = 0
    python: str = "python3"
    ssh_options: tuple[str, ...] = ()
    ssh_config: str = ""
    certificate: str = ""
    key: str = ""
    patience_s: float = 600.0
    runtime: Runtime = field(default_factory=Runtime)
    protocol: Protocol = field(default_factory=Protocol)
    fusion: Fusion = field(default_factory=Fusion)

    def with_threads(self, threads: int | None) -> Target:
        """The same target with another thread count (None keeps it). Raises DeviceError below 1, and above what
        a local machine has."""
        if threads is None:
            return self
        if threads < 1:
            raise DeviceError(f"target {self.name}: {threads} threads asked; expected at least 1")
        cores = os.cpu_count()
        if self.device == "local" and cores is not None and threads > cores:
            raise DeviceError(f"target {self.name}: {threads} threads asked; this machine has {cores} cores")
        return dataclasses.replace(self, runtime=dataclasses.replace(self.runtime, threads=threads))

    def on(self, hosts: str | None) -> Target:
        """The same target reached by ssh at ``hosts``, or its page served on that address (None keeps it as it is).
        Raises DeviceError for an empty name, and for a target that is reached in no such way."""
        if hosts is None:
            return self
        if not all(host.strip() for host in hosts.split(",")):
            raise DeviceError(f"--on {hosts!r}: expected HOST or HOST,HOST")
        if self.device == "browser":
            return dataclasses.replace(self, host=hosts)
        if self.device not in ("local", "ssh"):
            raise DeviceError(
                f"target {self.name}: --on names ssh hosts; its device is {self.device!r}, leave --on out"
            )
        return dataclasses.replace(self, device="ssh", host=hosts)


def home() -> Path:
    """The user's own directory: targets and profiles in it come first."""
    return own_folder("XDG_CONFIG_HOME", ".config")


def own_folder(variable: str, default: str) -> Path:
    """$EDGEPRUNE_HOME, else ``edgeprune`` below what ``variable`` names, else below ``default`` of the home folder."""
    own = os.environ.get("EDGEPRUNE_HOME")
    if own:
        return Path(own)
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "edgeprune"


def search_path(kind: str) -> list[Path]:
    """Existing directories that may hold ``kind`` ("targets" or "profiles"), the user's own first."""
    package = Path(__file__).resolve().parent.parent
    places = [home() / kind, package.parent / kind, package / "_data" / kind]
    if not (package.parent / "pyproject.toml").is_file():  # an installed package: the folder beside it is not ours
        del places[1]
    return [place for place in places if place.is_dir()]


def list_targets() -> dict[str, Path]:
    """Target name -> its file; of equal names the user's own wins."""
    found: dict[str, Path] = {}
    for place in search_path("targets"):
        for path in sorted(place.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def find_target(name: str, threads: int | None = None, on: str | None = None) -> Target:
    """The target of that name, at the ssh hosts ``on``. Raises DeviceError when there is none, or its file is wrong."""
    targets = list_targets()
    if name not in targets:
        known = ", ".join(sorted(targets)) or "none"
        raise DeviceError(f"no target named {name!r}; known targets: {known}. `edgeprune targets` lists them")
    return read_target(targets[name]).on(on).with_threads(threads)


def read_target(path: Path) -> Target:
    """Parse one target file. An unknown key or a wrong type is a DeviceError that names it and its line."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise DeviceError(f"cannot read target file {path}: {error}") from None
    document.setdefault("name", path.stem)
    source = _Source(str(path), text)
    target: Target = _build(Target, document, source, "")
    if target.name != path.stem:
        raise DeviceError(f"{source.at('name')}: name is {target.name!r}; expected {path.stem!r}, the name of the file")
    if target.device == "local":
        for key in ("host", "user", "port", "ssh_options", "ssh_config", "certificate", "key"):
            if getattr(target, key):
                raise DeviceError(f'{source.at(key)}: {key!r} is for other machines; expected device = "ssh" with it')
    return target.with_threads(target.runtime.threads)


@dataclass(frozen=True, slots=True)
class _Source:
    path: str
    text: str

    def at(self, key: str) -> str:
        """FILE:LINE of a key, told as ``table.key`` where it is in a table; FILE where it cannot be found."""
        table, _, name = key.rpartition(".")
        inside = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            if head := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
                inside = head[1]
                if not table and inside == name:
                    return f"{self.path}:{number}"
            elif inside == table and re.match(rf"\s*[\"']?{re.escape(name)}[\"']?\s*=", line):
                return f"{self.path}:{number}"
        return self.path


_TABLES: dict[str, Any] = {"runtime": Runtime, "protocol": Protocol, "fusion": Fusion}


def _build(kind: Any, values: dict[str, Any], source: _Source, prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        where = source.at(prefix + key)
        if key not in fields:
            raise DeviceError(f"{where}: unknown key {prefix + key!r}; expected one of {', '.join(sorted(fields))}")
        if not prefix and key in _TABLES:
            if not isinstance(value, dict):
                raise DeviceError(f"{where}: {key!r} is no table; expected [{key}]")
            arguments[key] = _build(_TABLES[key], value, source, f"{key}.")
            continue
        arguments[key] = _convert(value, str(fields[key].type), f"{where}: {prefix + key!r}")
    return kind(**arguments)


def _convert(value: Any, kind: str, where: str) -> Any:
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return float(value)
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise DeviceError(f"{where} is {value!r}; expected {'a list of names' if kind.startswith('tuple') else kind}")
