"""Per-channel affine maps, and how the weights around them take them in. Float64 until the one rounding at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeprune.graph.network import CONV_TRANSPOSES


@dataclass(frozen=True, slots=True)
class Affine:
    """``y = scale * x + shift`` per channel; both float64, of shape (C,) or () ."""

    scale: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, slots=True)
class Shortcut:
    """``y + scale * x + shift`` per channel, ``y`` the output of a convolution and ``x`` its input; as ``Affine``."""

    scale: torch.Tensor
    shift: torch.Tensor


Link = Affine | Shortcut


def of_batch_norm(norm: Any) -> Affine:
    """What a batch norm with running statistics does."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return Affine(scale, shift)


def absorb(leaf: Any, chain: Sequence[Link]) -> None:
    """Change weight and bias of a convolution or linear so that it gives what the chain gives behind it: for each link
    in turn ``scale * (W x + b) + shift``, or ``W x + b + scale * x + shift`` for a shortcut (convolutions that can
    hold one only, see fold_residual.py)."""
    weight = leaf.weight.detach().double()
    transposed = isinstance(leaf, CONV_TRANSPOSES)
    channels = leaf.out_channels if transposed else weight.shape[0]
    bias = leaf.bias.detach().double() if leaf.bias is not None else weight.new_zeros(channels)
    for link in chain:
        scale = link.scale.expand(channels)
        if isinstance(link, Shortcut):
            weight, bias = weight + dirac(leaf, scale), bias + link.shift
            continue
        bias = bias * scale + link.shift
        if transposed:  # weight (in, out / groups, ...); output channel = group * (out / groups) + column
            grouped = weight.reshape(leaf.groups, -1, *weight.shape[1:])
            shape = (leaf.groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
            weight = (grouped * scale.reshape(shape)).reshape(weight.shape)
        else:
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    _set(leaf, weight, bias)


def dirac(leaf: Any, scale: torch.Tensor) -> torch.Tensor:
    """The kernel of ``scale * x``, (C, C / groups, *k): row o takes input o of its own group, at the centre."""
    kernel = torch.zeros_like(leaf.weight, dtype=torch.float64)
    rows = torch.arange(len(scale), device=scale.device)
    centre = sum(k // 2 * math.prod(kernel.shape[d + 1 :]) for d, k in enumerate(kernel.shape) if d >= 2)
    kernel.flatten(2)[rows, rows % kernel.shape[1], centre] = scale
    return kernel


def feed(leaf: Any, affine: Affine) -> None:
    """Change an unpadded convolution or a linear so that it takes what the map takes: ``W (scale * x + shift) + b``."""
    weight = leaf.weight.detach().double()
    groups = int(getattr(leaf, "groups", 1))
    out, per_group = weight.shape[0], weight.shape[1]
    ones = [1] * (weight.dim() - 2)
    # row o of a grouped convolution reads the inputs of group o // (out / groups)
    scale, shift = (
        v.reshape(groups, 1, per_group).expand(groups, out // groups, per_group).reshape(out, per_group, *ones)
        for v in (affine.scale, affine.shift)
    )
    bias = (weight * shift).flatten(1).sum(1)
    if leaf.bias is not None:
        bias = bias + leaf.bias.detach().double()
    _set(leaf, weight * scale, bias)


def attenuate(leaf: Any, scale: torch.Tensor) -> None:
    """Change a convolution, transposed convolution or linear so that it takes what is ``scale``, () or (C,), times too
    large: ``W (scale * x) + b``, for padded convolutions too, since zeros stay zeros."""
    weight = leaf.weight.detach().double()
    if scale.dim():
        groups = int(getattr(leaf, "groups", 1))
        ones = [1] * (weight.dim() - 2)
        if isinstance(leaf, CONV_TRANSPOSES):
            scale = scale.reshape(-1, 1, *ones)
        else:  # row o reads the inputs of group o // (out / groups)
            rows = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
            scale = rows.reshape(weight.shape[0], -1, *ones)
    leaf.weight = nn.Parameter((weight * scale).to(leaf.weight.dtype), requires_grad=leaf.weight.requires_grad)


def _set(leaf: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    old = leaf.weight
    leaf.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    leaf.bias = nn.Parameter(bias.to(old.dtype), requires_grad=old.requires_grad)
