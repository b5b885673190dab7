"""Writes what a run delivers.

Everything is first written under temporary names and then renamed, in the order given: where the last file is, those
before it are complete and belong to it. A run that dies leaves what was there before.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from edgeprune.errors import UsageError

Content = bytes | str | Callable[[Path], None]


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
