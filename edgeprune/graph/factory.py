"""Building the network that a state_dict belongs to: code the user names, never code of the model file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.errors import EdgepruneError, ModelFileError, UsageError

_SHOWN = 5


def build(factory: str) -> nn.Module:
    """Call ``package.module:function`` or ``file.py:function`` without arguments.

    The working directory counts as a place to import from. Raises UsageError when it cannot be found, fails, or
    returns something other than an nn.Module.
    """
    where, _, name = factory.rpartition(":")
    if not where or not name:
        raise UsageError(f"--factory {factory}: expected package.module:function or file.py:function")
    try:
        function: Any = _module(where)
        for part in name.split("."):
            if not hasattr(function, part):
                raise UsageError(f"--factory {factory}: {where} has no {name}")
            function = getattr(function, part)
        module = function()
    except EdgepruneError:
        raise
    except Exception as error:  # the user's own code may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--factory {factory}: {type(error).__name__}: {reason}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--factory {factory}: returned a {type(module).__name__}, expected a torch.nn.Module")
    return module


def _module(where: str) -> Any:
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise UsageError(f"--factory: no file {where}; expected package.module:function or file.py:function")
        name = f"edgeprune_factory_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UsageError(f"--factory: {where} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickles look their module up by name
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(where)


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, factory: str) -> None:
    """Load the weights strictly; a wrapper's prefix ("module.") goes, missing ``num_batches_tracked`` are no matter.

    Raises ModelFileError listing what is missing, unexpected or of another shape.
    """
    expected = module.state_dict()
    weights = _unwrapped(weights, expected)
    missing = [k for k in expected if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in expected]
    differing = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in weights and isinstance(v, torch.Tensor) and weights[k].shape != v.shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if names
    ]
    if problems:
        raise ModelFileError(
            f"{path}: the weights do not belong to the network of --factory {factory}: {'; '.join(problems)}"
        )
    module.load_state_dict(dict(weights), strict=False)


def _unwrapped(weights: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """Without the names that DataParallel ("module."), torch.compile ("_orig_mod.") or a trainer put in front."""
    while not set(weights) & set(expected):
        prefixes = {k.partition(".")[0] for k in weights}
        if len(prefixes) != 1 or not all("." in k for k in weights):
            break
        weights = {k.partition(".")[2]: v for k, v in weights.items()}
    return weights
