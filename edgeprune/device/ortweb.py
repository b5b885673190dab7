"""The files of onnxruntime-web: one pinned version from the npm registry, in the user's cache, in no repository."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from edgeprune.device.target import own_folder
from edgeprune.errors import DeviceError

VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
PACKAGE = f"onnxruntime-web@{VERSION}"
FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}


def folder() -> Path:
    """Where the files lie."""
    return own_folder("XDG_CACHE_HOME", ".cache") / "onnxruntime-web" / VERSION


def files(provider: str) -> list[Path]:
    """The files that a provider needs. Raises DeviceError when they were not fetched, or the provider is unknown."""
    if provider not in FILES:
        raise DeviceError(f"onnxruntime-web has no provider {provider!r} here; expected one of {', '.join(FILES)}")
    paths = [folder() / name for name in FILES[provider]]
    if not all(path.is_file() for path in paths):
        raise DeviceError(f"{PACKAGE} is not in {folder()}; fetch it with `edgeprune targets fetch web-{provider}`")
    return paths


def fetch(archive: Path | None = None) -> Path:
    """Put the files into the user's cache, from the npm package ``archive`` or from the registry by ``npm``.

    Raises DeviceError when the package cannot be had or is not the one that is expected.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as place:
        content = _content(archive or _pack(Path(place)))
        tarball = Path(place) / "package.tgz"
        tarball.write_bytes(content)
        unpacked = Path(place) / "files"
        unpacked.mkdir()
        with tarfile.open(tarball) as tar:
            for name in (name for names in FILES.values() for name in names):
                member = tar.extractfile(f"package/dist/{name}")
                if member is None:
                    raise DeviceError(f"{PACKAGE} has no {name}; expected the package of that version")
                (unpacked / name).write_bytes(member.read())
        target = folder()
        target.mkdir(parents=True, exist_ok=True)
        for path in unpacked.iterdir():
            partial = target / f"{path.name}.{os.getpid()}"
            shutil.copyfile(path, partial)
            partial.replace(target / path.name)
    return target


def _content(archive: Path) -> bytes:
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise DeviceError(f"{archive}: {error.strerror or error}; expected the npm package {PACKAGE}") from None
    kind, _, wanted = INTEGRITY.partition("-")
    found = base64.b64encode(hashlib.new(kind, content).digest()).decode()
    if found != wanted:
        raise DeviceError(f"{archive} is not {PACKAGE} (its {kind} differs); make it with `npm pack {PACKAGE}`")
    return content


def _pack(place: Path) -> Path:
    by_hand = (
        f"run `npm pack {PACKAGE}` on a computer that can, and then `edgeprune targets fetch web-wasm --from FILE.tgz`"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise DeviceError(f"npm is not installed here; install it, or {by_hand}")
    try:
        done = subprocess.run([npm, "pack", PACKAGE], cwd=place, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"`npm pack {PACKAGE}` did not end in 10 minutes; {by_hand}") from None
    found = sorted(place.glob("*.tgz"))
    if done.returncode or not found:
        words = " ".join(done.stderr.split())[-300:]
        raise DeviceError(f"`npm pack {PACKAGE}` failed: {words}; {by_hand}")
    return found[0]
