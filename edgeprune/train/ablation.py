"""What it does to the next layers when some units of a channel group are held at zero, seen beside a training step.

Masks lie on the inputs of the layers that read a group, so that a masked unit gives nothing to anyone and gets no
gradient. While the student answers a batch its readers' inputs and outputs are noted; afterwards the readers alone run
once more with some units ablated, and what comes out of them, after their batch norm and activation where these follow
directly, is compared with what came out before. The batch norm uses the statistics it used in the pass itself, and
nothing of the student is changed.

Source: Ding et al., "Approximated Oracle Filter Pruning" (ICML 2019): ``t = sum (Z - Z_ablated)^2 / sum Z^2``, Z the
next layer's output. The authors' code for PyTorch normalises the ablated pass by its own batch statistics and lets it
move the running ones; here it does neither.

Shapes: x (N, ...) inputs; draws (parts, units of the group) bool: the images of a batch are divided among the parts.

Deviations: a group may have several readers, as the trunk of a residual network has: their outputs count as one long
vector. A batch counts as several draws, each on a part of its images, since what differs between draws is mostly the
units drawn and not the images: the damage of a draw is the change in its part over that part's share of the batch's
energy. A grouped or depthwise convolution on the way belongs to the group and is run through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgeprune.graph.channels import ChannelGroup, Channels
from edgeprune.graph.network import Network
from edgeprune.graph.surgery import zero_inputs
from edgeprune.train.readers import Reader, along, find_readers, input_channels


class Ablation:
    """Masks and scores of some groups of a student, while ``attached``.

    masked: (all units of all groups + 1,) bool, as ``Channels.removed`` counts them; the last one is never masked
    watching: whether the coming passes in training mode are noted
    """

    def __init__(self, network: Network, channels: Channels, groups: Sequence[ChannelGroup]) -> None:
        self.module, self.channels = network.module, channels
        self.offsets = {g.name: o for g, o in zip(channels.groups, channels.offsets, strict=True)}
        self.readers = {g.name: find_readers(network, channels, g) for g in groups}
        self.indices = {g.name: {r.path: r.index for r in self.readers[g.name]} for g in groups}
        self.widths = {
            path: input_channels(network.module.get_submodule(path))
            for path in {r.path for readers in self.readers.values() for r in readers}
        }
        self.watching = False
        self._noted: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.mask({})

    def mask(self, alive: Mapping[str, np.ndarray]) -> None:
        """Hold the units that are not alive at zero; alive: group name -> (units,) bool, groups not named are whole."""
        self.masked = np.zeros(sum(g.size for g in self.channels.groups) + 1, bool)
        keeps = {path: np.ones(width, np.float32) for path, width in self.widths.items()}
        for name, units in alive.items():
            self.masked[self.offsets[name] : self.offsets[name] + len(units)] = ~units
            for path, index in self.indices[name].items():
                keeps[path][index[~units].ravel()] = 0
        self._keep = {path: torch.from_numpy(keep) for path, keep in keeps.items() if not keep.all()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Masks act, on the student and on copies made of it meanwhile; only the student's own passes are noted."""
        handles = []
        for path in self.widths:
            leaf = self.module.get_submodule(path)
            before, after = self._hooks(path, leaf)
            handles += [leaf.register_forward_pre_hook(before), leaf.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, path: str, own: nn.Module) -> tuple[Any, Any]:
        # functions and not methods: a copy of the module must not copy all of this
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            keep = self._keep.get(path)
            return None if keep is None else (inputs[0] * along(module, keep.to(inputs[0]), inputs[0]),)

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self.watching and module is own and module.training:
                self._noted.setdefault(path, []).append((inputs[0].detach(), output.detach()))

        return before, after

    def forget(self) -> None:
        """Let go of the pass that was noted."""
        self._noted = {}

    def divisible(self, group: str, images: int) -> bool:
        """Whether the first dimension of all that the group's readers saw is that of the batch."""
        return all(len(self._noted[r.path][r.call][0]) == images for r in self.readers[group])

    @torch.no_grad()
    def damage(self, group: str, drawn: np.ndarray) -> np.ndarray:
        """(parts,) float64: the change of the readers' outputs when each part of the images goes without the units that
        were drawn for it, over the part's share of the outputs' energy in the whole batch; the mean over the parts is
        one ratio of sums. The parts are equally large, to one image; there must not be more of them than images."""
        change, energy = torch.zeros(len(drawn), dtype=torch.float64), 0.0
        share = torch.ones(len(drawn))
        for reader in self.readers[group]:
            x, y = self._noted[reader.path][reader.call]
            keep = np.ones((len(drawn), self.widths[reader.path]), np.float32)
            for part, units in enumerate(drawn):
                keep[part, reader.index[units].ravel()] = 0
            part_of_row = torch.arange(len(x)) * len(drawn) // len(x)
            leaf = self.module.get_submodule(reader.path)
            rows = torch.from_numpy(keep)[part_of_row].to(x) if len(drawn) > 1 else torch.from_numpy(keep).to(x)
            ablated = leaf.forward(x * along(leaf, rows, x))
            tail = self._tail(reader, leaf, y)
            base, other = tail(y), tail(ablated)
            change.index_add_(0, part_of_row, (base - other).square().flatten(1).sum(1, dtype=torch.float64).cpu())
            energy += float(base.square().sum(dtype=torch.float64))
            share = part_of_row.bincount(minlength=len(drawn)) / len(x)
        moved = (change / share).numpy()
        return moved / energy if energy > 0 else np.where(moved > 0, np.inf, 0.0)

    def _tail(self, reader: Reader, leaf: nn.Module, y: Tensor) -> Any:
        """What follows a reader, as a function of its output, with the statistics of ``y``."""
        scale = shift = None
        if reader.norm is not None:
            scale, shift = _normaliser(reader.norm, y)
        stays = None
        if self.masked[reader.output].any():
            stays = torch.from_numpy(~self.masked[reader.output]).to(y)

        def tail(value: Tensor) -> Tensor:
            if scale is not None and shift is not None:
                value = value * along(leaf, scale, value) + along(leaf, shift, value)
            if reader.activation is not None:
                node = reader.activation
                args = [value if isinstance(a, fx.Node) else a for a in node.args]
                value = node.target(*args, **node.kwargs)  # type: ignore[operator]
            return value if stays is None else value * along(leaf, stays, value)

        return tail


def _normaliser(norm: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift), (channels,) each, of a batch norm for a batch ``y`` (N, channels, ...)."""
    if norm.training or norm.running_mean is None:
        dims = [d for d in range(y.dim()) if d != 1]
        mean, var = y.mean(dims), y.var(dims, correction=0)
    else:
        mean, var = norm.running_mean, norm.running_var
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    return scale, -mean * scale if norm.bias is None else norm.bias - mean * scale


def silence(network: Network, channels: Channels, alive: Mapping[str, np.ndarray]) -> None:
    """Zero, in place, the weights with which layers read units that are not alive: what their masks did, the weights
    now do. alive: group name -> (units,) bool."""
    for group in channels.groups:
        for slot in group.slots:
            if slot.role != "in" or group.name not in alive:
                continue
            gone = slot.index[~alive[group.name]].ravel()
            zero_inputs(network.module.get_submodule(slot.target), gone.tolist())
