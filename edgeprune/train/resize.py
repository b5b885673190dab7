"""Samples at another height and width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from edgeprune.train.sources import FolderSource, Source


def resize(x_nchw: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear with antialiasing, as image libraries do it; bytes are rounded to bytes. size: (height, width)."""
    if tuple(x_nchw.shape[2:]) == tuple(size):
        return x_nchw
    x = x_nchw if x_nchw.is_floating_point() else x_nchw.float()
    x = functional.interpolate(x, tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return x if x_nchw.is_floating_point() else x.round_().clamp_(0, 255).to(x_nchw.dtype)


class ResizedSource:
    """Another source's samples, resized when they are read."""

    def __init__(self, source: Source, size: tuple[int, int]):
        self.source, self.size = source, size
        self.labels, self.classes = source.labels, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: np.ndarray) -> torch.Tensor:
        return resize(self.source.read(indices), self.size)


def resized(source: Source, size: tuple[int, int]) -> Source:
    return source.resized(*size) if isinstance(source, FolderSource) else ResizedSource(source, size)
