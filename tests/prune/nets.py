"""A small residual network with trained-like statistics, and calibration images for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.graph.lift import lift
from edgeprune.graph.network import Network


class Block(nn.Module):
    def __init__(self, c: int, hidden: int, gain: float):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        nn.init.constant_(self.bn2.weight, gain)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Small(nn.Module):
    """Stem, residual blocks of the given gains, head; input (N, 3, 8, 8)."""

    def __init__(self, gains=(0.3, 0.1, 0.6, 0.2), c=8, hidden=12, classes=5):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.blocks = nn.Sequential(*(Block(c, hidden, g) for g in gains))
        self.head = nn.Linear(c, classes)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def images(count: int, seed: int = 1, size: int = 8) -> torch.Tensor:
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), 3, 1) * 3


def small(**kwargs) -> Network:
    torch.manual_seed(0)
    module = Small(**kwargs)
    module.train()
    with torch.no_grad():
        for _ in range(30):  # gives the batch norms the statistics of the data
            module(images(32, seed=0))
    return lift(module.eval(), [(1, 3, 8, 8)])
