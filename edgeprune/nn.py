"""Layers to build networks of, for training from scratch; edgeprune folds them when it exports."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.errors import UsageError


class ResConv2d(nn.Module):
    """A convolution with a shortcut of its own: ``activation(lam * norm(conv(x)) + m * x)``.

    In training the shortcut carries signal past the layer, as in a residual network; when edgeprune exports or
    compresses the network, convolution, norm, ``lam`` and shortcut become one plain convolution. A layer whose ``lam``
    training drove to zero can be deleted.

    channels:    in and out, the same
    kernel_size: odd; the map keeps its size
    bias:        of the convolution; by default only without a norm
    norm:        whether a batch norm follows the convolution
    activation:  a module behind the sum, None for none
    x, result:   (N, channels, H, W)
    Raises UsageError for an even kernel, or channels that the groups do not divide.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        norm: bool = True,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(kernel_size, int) or kernel_size < 1 or dilation < 1:
            raise UsageError(f"kernel_size {kernel_size}, dilation {dilation}: expected numbers of at least 1")
        if kernel_size % 2 == 0:
            raise UsageError(f"kernel_size {kernel_size} has no centre for the shortcut; expected an odd one")
        if channels < 1 or groups < 1 or channels % groups:
            raise UsageError(f"{channels} channels in {groups} groups; expected a multiple of the groups")
        self.conv = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            groups=groups,
            bias=not norm if bias is None else bias,
        )
        self.norm = nn.BatchNorm2d(channels) if norm else None
        self.activation = activation
        self.lam = nn.Parameter(torch.ones(()))
        self.m = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.norm is not None:
            y = self.norm(y)
        y = self.lam * y + self.m * x
        return y if self.activation is None else self.activation(y)
