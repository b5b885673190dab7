"""Writes what a run delivers: NAME.onnx, NAME.pt2, plan.json, report.json.

Everything is first written under temporary names and then renamed, ``report.json`` last: where there is a report, the
files beside it are complete and belong to it. A run that dies leaves what was there before.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from edgeprune.errors import UsageError

Content = bytes | str | Callable[[Path], None]


def write_bundle(
    folder: str | Path, name: str, *, onnx: bytes, save_network: Callable[[Path], None], plan: str, report: str
) -> dict[str, Path]:
    """Write the deliverables of a run; the folder is made if need be.

    save_network: writes the compressed torch network to the path it is given (``edgeprune.graph.load.save``)
    plan, report: JSON texts

    Returns the paths by "onnx", "pt2", "plan" and "report". Raises UsageError when the folder cannot be written.
    """
    files: dict[str, Content] = {
        f"{name}.onnx": onnx,
        f"{name}.pt2": save_network,
        "plan.json": plan,
        "report.json": report,
    }
    paths = write_files(folder, files)
    return dict(zip(("onnx", "pt2", "plan", "report"), paths, strict=True))


def write_files(folder: str | Path, files: Mapping[str, Content]) -> list[Path]:
    """Write files all or none, and rename them into place in the order given.

    A content is bytes, text (UTF-8), or a function that writes the file itself. Raises UsageError when the folder
    cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as place:
            for name, content in files.items():
                _write(Path(place, name), content)
            for name in files:
                os.replace(Path(place, name), folder / name)
        _sync(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot write to {folder}: {reason}; give another directory with --out") from None
    return [folder / name for name in files]


def _write(path: Path, content: Content) -> None:
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    _sync(path)


def _sync(path: Path) -> None:
    """A rename must not reach the disk before what it renames. Directories cannot be opened everywhere."""
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
