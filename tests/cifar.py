"""The CIFAR ResNets of He et al. (2016), with the parameter-free shortcut (option A) or a projection (option B)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from support import randomise_norms
from torch import nn

from edgeprune.graph.lift import lift
from edgeprune.graph.network import Network


class _Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, projection: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.padding = (c_out - c_in) // 2
        self.shortcut = nn.Sequential()
        if projection and (stride != 1 or c_in != c_out):
            self.padding = 0
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            return F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding)))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """depth = 6 n + 2; input (N, 3, 32, 32). State dicts of the usual public weights fit."""

    def __init__(self, depth: int = 20, projection: bool = False, classes: int = 10):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1, projection) for _ in range(n)))
        self.layer2 = nn.Sequential(
            *(_Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1, projection) for i in range(n))
        )
        self.layer3 = nn.Sequential(
            *(_Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1, projection) for i in range(n))
        )
        self.linear = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.size(3))
        return self.linear(x.view(x.size(0), -1))


@functools.cache
def lifted(depth: int = 20, projection: bool = False) -> Network:
    """A random one in canonical form, the same object every time: not to be changed."""
    torch.manual_seed(0)
    return lift(randomise_norms(CifarResNet(depth, projection)).eval(), [(1, 3, 32, 32)])
