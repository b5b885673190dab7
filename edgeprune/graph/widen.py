"""Widening channel groups: the inverse of a cut. The new network computes what the old one did, until it is trained.

New units are copies of old ones with noise on the weights that make them; the weights that read them are zero. So the
outputs stay what they were, batch norms have statistics that fit, and the zeros have a gradient from the first step on.

Source: the wide network of Ding et al., "Approximated Oracle Filter Pruning" (ICML 2019), section on re-designing
networks, is trained from scratch; growing a trained network without changing its function is the idea of Chen,
Goodfellow, Shlens, "Net2Net" (ICLR 2016), which divides the readers' weights among the copies instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.graph.channels import ChannelGroup, Channels, analyse, is_depthwise
from edgeprune.graph.network import CONV_TRANSPOSES, CONVS, Network
from edgeprune.graph.refit import Survivors
from edgeprune.graph.surgery import cut, resized, zero_inputs

NOISE = 0.5  # of a filter's root mean square
TOLERANCE = 1e-4  # between the outputs before and after, relative


def inner_groups(channels: Channels) -> list[ChannelGroup]:
    """The groups that one layer makes, and no other has to follow: what lies inside a residual block or in a chain."""
    return [
        group
        for group in channels.groups
        if sum(slot.role == "out" for slot in group.slots) == 1
        and any(slot.role == "in" for slot in group.slots)
        and not any(slot.role == "param" for slot in group.slots)
    ]


def widen(network: Network, widths: Mapping[str, int], seed: int = 0) -> Network:
    """A network of the same outputs with groups of the given, larger or equal, widths (group name -> units).

    Raises UsageError for an unknown group or a smaller width, and UnsupportedModelError where a layer between (a norm
    over channels, say) would give other outputs.
    """
    channels = analyse(network)
    rng = np.random.default_rng((seed, 83))
    copies = np.ones(sum(g.size for g in channels.groups) + 1, np.int64)
    for name, width in widths.items():
        group = channels.group(name)
        if width < group.size:
            raise UsageError(f"group {name!r} has {group.size} units already; expected at least as many, got {width}")
        offset = channels.offsets[channels.groups.index(group)]
        whole, extra = divmod(width, group.size)
        copies[offset : offset + group.size] = whole
        copies[offset + rng.choice(group.size, extra, replace=False)] += 1
    wide = resized(network, channels, copies)
    _wake(network, wide, Survivors(channels, copies), seed)
    _check(network, wide)
    return wide


def resize(network: Network, widths: Mapping[str, int], seed: int = 0) -> Network:
    """A network of other widths, larger or smaller: of groups that become narrower the first units stay."""
    channels = analyse(network)
    sizes = {group.name: group.size for group in channels.groups}
    keep = {name: range(width) for name, width in widths.items() if width < sizes.get(name, 0)}
    narrow = cut(network, channels, keep)
    return widen(narrow, {name: width for name, width in widths.items() if name not in keep}, seed)


@torch.no_grad()
def _wake(network: Network, wide: Network, survivors: Survivors, seed: int) -> None:
    """Noise on the weights that make a copy, zeros where it is read."""
    generator = torch.Generator().manual_seed(seed)
    seen = set()
    for node in network.module.graph.nodes:
        leaf: Any = wide.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(leaf, (*CONVS, *CONV_TRANSPOSES, nn.Linear)) or node.target in seen:
            continue
        seen.add(node.target)
        read, made = _repeated(survivors.index(node.args[0])), _repeated(survivors.index(node))
        if not is_depthwise(leaf):
            zero_inputs(leaf, read)
        if isinstance(leaf, CONV_TRANSPOSES) and leaf.groups > 1:
            continue  # its filters lie in blocks: they stay copies, told apart by what reads them
        filters = leaf.weight.transpose(0, 1) if isinstance(leaf, CONV_TRANSPOSES) else leaf.weight
        for position in made:
            noise = torch.randn(filters[position].shape, generator=generator)
            filters[position] += NOISE * filters[position].square().mean().sqrt() * noise.to(filters)


def _repeated(index: np.ndarray | None) -> list[int]:
    """Positions that hold what an earlier position holds already."""
    if index is None:
        return []
    first = np.unique(index, return_index=True)[1]
    return np.setdiff1d(np.arange(len(index)), first).tolist()


def _check(network: Network, wide: Network) -> None:
    inputs = network.random_inputs(2)
    pairs = []
    for module in (network.module, wide.module):
        training = module.training
        module.eval()
        with torch.no_grad():
            outputs = module(*inputs)
        module.train(training)
        pairs.append(outputs if isinstance(outputs, (tuple, list)) else (outputs,))
    for before, after in zip(*pairs, strict=True):
        error = float((before - after).abs().max()) / max(float(before.abs().max()), 1e-30)
        if not error <= TOLERANCE:
            raise UnsupportedModelError(
                f"{network.origin}: widening changes its outputs by {error:.2g} of the largest: something between "
                "reads all channels alike, a norm over them for one; widen other groups"
            )
