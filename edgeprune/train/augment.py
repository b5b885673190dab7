"""Light augmentation of image tensors: random crop with padding, random flip.

What is done to image ``i`` in view ``v`` is a pure function of (seed, v, i), never of the order of the batches: so an
interrupted run repeats it, and the original network's answer to a view can be kept and used again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

STABLE = 0.8  # of the classes must survive what a sample is augmented by


@dataclass(frozen=True, slots=True)
class Augment:
    """pad: pixels of zero padding before a random crop back to the same size (0: none); flip: mirror half of them."""

    pad: int = 0
    flip: bool = False
    seed: int = 0

    def __bool__(self) -> bool:
        return self.pad > 0 or self.flip

    def views(self, count: int, view: int) -> Views:
        """The shifts and flips of ``count`` images in view number ``view``."""
        rng = np.random.default_rng((self.seed, view, 77))
        shifts = rng.integers(-self.pad, self.pad + 1, size=(count, 2), dtype=np.int64)
        flips = rng.integers(0, 2, size=count, dtype=np.int64).astype(bool) & self.flip
        return Views(shifts, flips)


@dataclass(frozen=True, slots=True)
class Views:
    """shifts: (N, 2) rows and columns the image moves by; flips: (N,) bool, mirrored left to right first."""

    shifts: np.ndarray
    flips: np.ndarray

    def apply(self, x_nchw: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        """x_nchw: the images at ``positions``; returns a new tensor of the same shape and dtype, zeros moved in."""
        shifts, flips = self.shifts[positions], self.flips[positions]
        pad = int(np.abs(shifts).max(initial=0))
        source = x_nchw.numpy()
        count, channels, height, width = source.shape
        padded = np.zeros((count, channels, height + 2 * pad, width + 2 * pad), source.dtype)
        padded[:, :, pad : pad + height, pad : pad + width] = source
        flipped = np.flatnonzero(flips)
        padded[flipped] = padded[flipped, :, :, ::-1]
        out = np.empty_like(source)
        for i, (dy, dx) in enumerate((pad - shifts).tolist()):
            out[i] = padded[i, :, dy : dy + height, dx : dx + width]
        return torch.from_numpy(out)


def suggested(input_shape: tuple[int, ...], seed: int = 0) -> Augment:
    """Crop and flip for anything that looks like an image (1 or 3 channels, at least 8 x 8 pixels), else nothing."""
    if len(input_shape) != 4 or input_shape[1] not in (1, 3) or min(input_shape[2:]) < 8:
        return Augment(seed=seed)
    return Augment(pad=max(1, min(input_shape[2:]) // 8), flip=True, seed=seed)


def chosen(
    mode: str,
    input_shape: tuple[int, ...],
    seed: int,
    x: torch.Tensor,
    scores: Callable[[torch.Tensor], torch.Tensor | None],
) -> tuple[Augment, str]:
    """The augmentation of a training run, and a sentence where "auto" left something out.

    "auto" keeps what the original network's classes survive on the samples ``x``: a mirrored photograph of a cat is
    one, a mirrored digit is not. Where it gives no classes (``scores`` returns None) images are augmented alike.
    """
    augment = suggested(input_shape, seed)
    if mode == "none" or not augment:
        return Augment(seed=seed), ""
    if mode != "auto":
        return replace(augment, flip=mode == "crop+flip"), ""
    plain = scores(x)
    if plain is None:
        return augment, ""
    dropped = []
    for name, alone in (("crop", replace(augment, flip=False)), ("flip", replace(augment, pad=0))):
        views = alone.views(len(x), 0)
        if name == "flip":
            views = Views(views.shifts, np.ones(len(x), bool))
        changed = scores(views.apply(x, np.arange(len(x))))
        assert changed is not None
        same = float((changed.argmax(1) == plain.argmax(1)).float().mean())
        if same < STABLE:
            dropped.append(f"{name} (it changes {1 - same:.0%} of the original's answers)")
            augment = replace(augment, **({"pad": 0} if name == "crop" else {"flip": False}))
    return augment, f"not augmented by {', '.join(dropped)}" if dropped else ""
