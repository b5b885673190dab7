"""Helpers that tests and tools share: torchvision on a CPU torch, random batch-norm statistics, relative error."""

from __future__ import annotations

import importlib.util
import pathlib
import re

import numpy as np
import torch
from torch import nn

from edgeprune.graph.channels import Channels
from edgeprune.graph.masking import masked_outputs
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, Network
from edgeprune.graph.surgery import cut

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
    version = pathlib.Path(spec.submodule_search_locations[0], "version.py").read_text()
    cpu_torch, cuda_build = torch.version.cuda is None, "+cu" in version
    if cpu_torch and cuda_build and not _libraries:  # else its own library declares them, and twice would abort
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


def random_keep(channels: Channels, seed: int, share: float | None = None) -> dict[str, list[int]]:
    """For every group some random units that stay: a random share of each, or about ``share``; at least one."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in channels.groups:
        part = rng.uniform(0.2, 1.0) if share is None else share
        count = max(1, round(group.size * part))
        keep[group.name] = sorted(rng.choice(group.size, count, replace=False).tolist())
    return keep


def cut_error(network: Network, channels: Channels, keep: dict[str, list[int]], seed: int = 0, batch: int = 2) -> float:
    """Relative error of the cut network against the masked original, the worst of its outputs."""
    inputs = network.random_inputs(batch, seed)
    expected = masked_outputs(network, channels, keep, inputs)
    with torch.no_grad():
        actual = cut(network, channels, keep).module(*inputs)
    actual = actual if isinstance(actual, (tuple, list)) else (actual,)
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def filter_share(network: Network, channels: Channels, classes: int = 1000) -> float:
    """Share of the output channels of all convolutions that can be pruned, classifiers (``classes`` outputs) aside."""
    total = prunable = 0
    for path, calls in network.modules_called().items():
        module = network.module.get_submodule(path)
        if isinstance(module, (*CONVS, *CONV_TRANSPOSES)) and module.out_channels != classes:
            total += module.out_channels
            found = channels.vector(calls[0].name)
            prunable += int((found[1] >= 0).sum()) if found is not None else 0
    return prunable / max(total, 1)
