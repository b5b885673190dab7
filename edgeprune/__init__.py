"""edgeprune: a trained convolutional network meets a latency budget measured on the target."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "check_table", "compress", "doctor", "export", "inspect", "list_methods", "load", "measure", "nn", "profile",
    "rebuild", "redesign", "save", "targets",
]  # fmt: skip

if TYPE_CHECKING:
    from edgeprune import nn
    from edgeprune.api import (
        check_table,
        compress,
        doctor,
        export,
        inspect,
        list_methods,
        load,
        measure,
        profile,
        rebuild,
        redesign,
        save,
        targets,
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    """The verbs are loaded when they are first used, so that ``edgeprune --help`` does not wait for torch."""
    if name == "nn":
        return importlib.import_module("edgeprune.nn")
    if name in __all__:
        from edgeprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
