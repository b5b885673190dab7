"""Helpers that tests and tools share: torchvision on a CPU torch, random batch-norm statistics, relative error."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from collections.abc import Iterator

import torch
from torch import nn

from edgeprune.graph.network import BATCH_NORMS, Network

_libraries: list[torch.library.Library] = []


def allow_torchvision() -> bool:
    """Make ``import torchvision`` work on a CPU torch; False where it is not installed.

    torchvision's wheels from the package index are CUDA builds: their operators do not load on a CPU torch, and the
    import fails where it registers shape functions for operators that do not exist. Declaring the operators first
    is enough for everything but detection.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    if not _libraries:
        registrations = pathlib.Path(spec.submodule_search_locations[0], "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted(set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', registrations))):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor x) -> Tensor")
        _libraries.append(library)
    return True


def randomise_norms(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms random statistics and all norms random affine parameters, in place: freshly built networks
    have none, and zeros or ones there would hide a wrong cut."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        with torch.no_grad():
            tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    for child in module.modules():
        if isinstance(child, BATCH_NORMS) and child.running_mean is not None and child.running_var is not None:
            uniform(child.running_mean, -0.5, 0.5)
            uniform(child.running_var, 0.5, 1.5)
        if isinstance(child, (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)):
            if child.weight is not None:
                uniform(child.weight, 0.5, 1.5)
            if child.bias is not None:
                uniform(child.bias, -0.5, 0.5)
    return module


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def parameter_count(network: Network) -> int:
    return sum(p.numel() for p in network.module.parameters())


def seeds(count: int) -> Iterator[int]:
    yield from range(count)
