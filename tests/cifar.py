"""The CIFAR ResNets of tools/models.py in canonical form, with batch norms that have seen something."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from support import randomise_norms

from edgeprune.graph.lift import lift
from edgeprune.graph.network import Network

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import models


@functools.cache
def lifted(depth: int = 20, projection: bool = False) -> Network:
    """A random one in canonical form, the same object every time: not to be changed."""
    torch.manual_seed(0)
    return lift(randomise_norms(models.CifarResNet((depth - 2) // 6, projection)).eval(), [(1, 3, 32, 32)])
