"""What a convolution or linear reads at sampled positions, as rows of a matrix.

Shapes
    rows   (positions, taps * channels + 1): taps outermost, then input channels, then a column of ones for the bias
    packed weight (taps * channels per group + 1, outputs): rows @ packed == the layer's output at those positions
Grouped layers have one such matrix per group, stacked in front: (groups, positions, p) and (groups, p, outputs/groups).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.graph.network import CONVS


class Positions:
    """The same random places for the same images, shapes and counts, whatever network is asked."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._cache: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def pick(self, images: int, spatial: tuple[int, ...], rows: int) -> tuple[Tensor, ...]:
        """(image, coordinate, ...) index vectors of about ``rows`` places, equally many in every image (some images
        only, if there are fewer rows than images), sorted by image. Fewer rows are a subset of more."""
        total = math.prod(spatial)
        order = self._order(images, spatial)
        per_image = max(1, min(total, rows // images))
        chosen = order[:, :per_image]
        if rows < images:
            chosen = chosen[: max(1, rows)]
        image = torch.arange(len(chosen)).repeat_interleave(per_image)
        flat = chosen.reshape(-1)
        coordinates = []
        for size in reversed(spatial):
            coordinates.append(flat % size)
            flat = flat // size
        return (image, *reversed(coordinates))

    def _order(self, images: int, spatial: tuple[int, ...]) -> Tensor:
        key = (images, spatial)
        if key not in self._cache:
            generator = torch.Generator().manual_seed(self.seed)
            scores = torch.rand(images, math.prod(spatial), generator=generator)
            self._cache[key] = scores.topk(min(4096, scores.shape[1]), dim=1).indices
        return self._cache[key]


def place_count(x: Tensor, channel_dim: int) -> tuple[int, ...]:
    """Sizes of the non-channel, non-batch dims of a value."""
    return tuple(int(s) for d, s in enumerate(x.shape) if d not in (0, channel_dim % x.dim()))


def output_places(leaf: Any, x: Tensor) -> tuple[int, ...]:
    """Sizes of the non-channel, non-batch dims of the layer's output for the input ``x``."""
    if isinstance(leaf, nn.Linear):
        return tuple(x.shape[1:-1])
    pad = leaf._reversed_padding_repeated_twice
    rank = len(leaf.kernel_size)
    sizes = []
    for d in range(rank):
        both = pad[2 * (rank - 1 - d)] + pad[2 * (rank - 1 - d) + 1]
        reach = leaf.dilation[d] * (leaf.kernel_size[d] - 1)
        sizes.append((int(x.shape[2 + d]) + both - reach - 1) // leaf.stride[d] + 1)
    return tuple(sizes)


def channel_dim(leaf: Any) -> int:
    """Where the layer's channels lie: 1 for convolutions and batch norms, last for linears."""
    return -1 if isinstance(leaf, nn.Linear) else 1


def values_at(parts: Sequence[Tensor], dim: int, where: tuple[Tensor, ...]) -> Tensor:
    """(positions, channels) of a value given in batches."""
    return torch.cat([x.movedim(dim, -1)[local] for x, local in _by_batch(parts, where)])


def rows_at(leaf: Any, parts: Sequence[Tensor], where: tuple[Tensor, ...]) -> Tensor:
    """The rows a layer reads to give its output at ``where``; see the module's docstring. Grouped: (groups, n, p)."""
    found = [_rows(leaf, x, local) for x, local in _by_batch(parts, where)]
    rows = torch.cat(found)  # (n, taps, channels)
    groups = int(getattr(leaf, "groups", 1))
    if groups == 1:
        return torch.cat([rows.flatten(1), rows.new_ones(len(rows), 1)], 1)
    n, taps, channels = rows.shape
    split = rows.reshape(n, taps, groups, channels // groups).permute(2, 0, 1, 3).flatten(2)
    return torch.cat([split, split.new_ones(groups, n, 1)], 2)


def _rows(leaf: Any, x: Tensor, where: tuple[Tensor, ...]) -> Tensor:
    if isinstance(leaf, nn.Linear):
        return x[where][:, None, :]
    last = _padded(leaf, x).movedim(1, -1).contiguous()
    image, *coordinates = where
    columns = []
    for tap in itertools.product(*(range(k) for k in leaf.kernel_size)):
        index = [c * s + t * d for c, s, t, d in zip(coordinates, leaf.stride, tap, leaf.dilation, strict=True)]
        columns.append(last[(image, *index)])
    return torch.stack(columns, 1)


def _padded(leaf: Any, x: Tensor) -> Tensor:
    padding = list(leaf._reversed_padding_repeated_twice)
    if not any(padding):
        return x
    mode = "constant" if leaf.padding_mode == "zeros" else leaf.padding_mode
    return F.pad(x, padding, mode=mode)


def _by_batch(parts: Sequence[Tensor], where: tuple[Tensor, ...]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    found, start = [], 0
    image = where[0]
    for x in parts:
        low, high = torch.searchsorted(image, torch.tensor([start, start + len(x)])).tolist()
        if high > low:
            found.append((x, (image[low:high] - start, *(c[low:high] for c in where[1:]))))
        start += len(x)
    return found


def pack(leaf: Any) -> Tensor:
    """The layer's weight and bias as (p, outputs), or (groups, p, outputs / groups), float32."""
    weight = leaf.weight.detach()
    outputs = weight.shape[0]
    flat = weight.reshape(outputs, weight.shape[1], -1).permute(2, 1, 0)  # taps, channels, outputs
    bias = leaf.bias.detach() if leaf.bias is not None else weight.new_zeros(outputs)
    groups = int(getattr(leaf, "groups", 1))
    if groups == 1:
        return torch.cat([flat.reshape(-1, outputs), bias[None]])
    grouped = flat.reshape(*flat.shape[:2], groups, outputs // groups).permute(2, 0, 1, 3).flatten(1, 2)
    return torch.cat([grouped, bias.reshape(groups, 1, -1)], 1)


def unpack(leaf: Any, packed: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias) in the layer's own shapes; the inverse of ``pack``."""
    shape = leaf.weight.shape
    if packed.dim() == 3:
        groups, p, per_group = packed.shape
        taps = (p - 1) // shape[1]
        flat = packed[:, :-1].reshape(groups, taps, shape[1], per_group).permute(1, 2, 0, 3).flatten(2)
        bias = packed[:, -1].reshape(-1)
    else:
        flat = packed[:-1].reshape(-1, shape[1], shape[0])
        bias = packed[-1]
    return flat.permute(2, 1, 0).reshape(shape).contiguous(), bias.clone()


def refittable(leaf: Any) -> bool:
    """Plain or grouped convolutions and linears whose weights are float32 and their own."""
    return isinstance(leaf, (*CONVS, nn.Linear)) and leaf.weight.dtype == torch.float32
