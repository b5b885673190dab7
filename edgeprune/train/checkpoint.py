"""A training run on disk: one file, replaced atomically, that can be loaded without running code out of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import UsageError

CHECKPOINT_VERSION = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, text, lists, dicts). After a crash the file is the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"version": CHECKPOINT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load(path: Path, identity: str) -> dict[str, Any] | None:
    """The saved state, or None where there is no file. Raises UsageError when it belongs to another run."""
    _remove_parts(path)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, found = state["version"], state["identity"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        raise UsageError(f"{path}: not a checkpoint of a training run; delete it to start from the beginning") from None
    if version != CHECKPOINT_VERSION:
        raise UsageError(f"{path}: written by another version of edgeprune; delete it to start from the beginning")
    if found != identity:
        raise UsageError(
            f"{path}: belongs to a run with another network, other data or other settings; "
            "repeat the same command to go on with it, or delete it to start from the beginning"
        )
    return dict(state)


def _remove_parts(path: Path) -> None:
    """What a killed run left half written."""
    for part in path.parent.glob(f"{path.name}*.part"):
        with contextlib.suppress(OSError):
            part.unlink()
