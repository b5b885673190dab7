"""Where samples are kept: arrays in memory, a folder of images, or somebody's map-style data set."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from edgeprune.errors import DataError

log = logging.getLogger("edgeprune")

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DECODE_AT_OPEN = 4096  # a folder up to this size is decoded at once, so that every broken file is known at the start
CACHE_BYTES = 1 << 30
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, MemoryError, Image.DecompressionBombError)


class Source(Protocol):
    """labels: (N,) int64 or None; classes: how many. ``read`` gives (n, C, ...) raw samples, uint8 or float32."""

    labels: np.ndarray | None
    classes: int | None

    def __len__(self) -> int: ...
    def read(self, indices: np.ndarray) -> torch.Tensor: ...


class ArraySource:
    """Everything in memory. x: (N, C, ...) uint8 or float32 tensor."""

    def __init__(self, x: torch.Tensor, labels: np.ndarray | None, classes: int | None = None):
        self.x, self.labels = x, labels
        self.classes = classes if classes is not None or labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.x)

    def read(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.x.numpy()[indices])  # numpy: no second team of threads beside the training


class FolderSource:
    """Image files; sub-folders are classes in sorted order, a flat folder is unlabelled. Read when asked for, and
    kept up to ``CACHE_BYTES``; a file that turns out broken only later is stood in for by the next readable one."""

    def __init__(self, folder: Path, chw: tuple[int, int, int]):
        self.seen = chw[1:]
        if chw[0] not in IMAGE_MODES:
            raise DataError(f"{folder}: images have 1, 3 or 4 channels, the network's input has {chw[0]}: use an .npz")
        files, labels, self.classes = _listing(folder)
        self._keep(chw)
        at_once = len(files) <= DECODE_AT_OPEN
        with ThreadPoolExecutor() as pool:
            results: list[Any] = list(pool.map(self._decoded if at_once else _has_header, files))
        good = [i for i, r in enumerate(results) if r is not None]
        _warn_broken([files[i] for i, r in enumerate(results) if r is None], len(files))
        if not good:
            raise DataError(f"{folder}: none of its {len(files)} images can be read; expected {_suffixes()}")
        self.files = [files[i] for i in good]
        self.labels = None if labels is None else labels[good]
        self.broken: set[int] = set()
        if at_once:
            for position, i in enumerate(good[: self.cache_size]):
                self.cache[position] = results[i]

    def _keep(self, chw: tuple[int, int, int]) -> None:
        self.chw = chw
        self.cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self.cache_size = max(1, CACHE_BYTES // (chw[0] * chw[1] * chw[2]))

    def resized(self, height: int, width: int) -> FolderSource:
        """The same part of every picture at another size, from the files' pixels."""
        other = copy.copy(self)
        other._keep((self.chw[0], height, width))
        return other

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> torch.Tensor:
        with ThreadPoolExecutor() as pool:
            pixels = list(pool.map(self._get, indices.tolist()))
        return torch.from_numpy(np.stack(pixels))

    def _get(self, index: int) -> np.ndarray:
        pixels = self.cache.get(index)
        if pixels is None:
            pixels = self._decoded(self.files[index])
            if pixels is None:
                if index not in self.broken:
                    self.broken.add(index)
                    _warn_broken([self.files[index]], len(self.files))
                if len(self.broken) == len(self.files):
                    raise DataError(f"{self.files[index].parent}: no image of this folder can be read any more")
                return self._get((index + 1) % len(self.files))
            if len(self.cache) < self.cache_size:
                self.cache[index] = pixels
        return pixels

    def _decoded(self, path: Path) -> np.ndarray | None:
        """(C, H, W) uint8: covered by a resize, cut out of the middle; None if the file is broken."""
        channels, height, width = self.chw
        try:
            with Image.open(path) as image:
                left, top, right, bottom = shown(image.size, *self.seen)
                image.draft("RGB", (width * 2, height * 2))  # lets a large JPEG decode at a fraction of its size
                picture = image.convert(IMAGE_MODES[channels])
                if (height, width) == self.seen:
                    pixels = np.asarray(fit(picture, height, width))
                else:
                    across, down = picture.size
                    box = left * across, top * down, right * across, bottom * down
                    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))
        except _BROKEN:
            return None
        return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1))


class MapSource:
    """A map-style data set too large to keep: items are fetched when asked for."""

    def __init__(self, items: Any, take: Any, labels: np.ndarray | None):
        self.items, self.take, self.labels = items, take, labels
        self.classes = None if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.items)

    def read(self, indices: np.ndarray) -> torch.Tensor:
        return torch.stack([self.take(self.items[i])[0] for i in indices.tolist()])


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that the image covers the input (with a rim of 1/8 for inputs of 128 pixels and more, as is usual for
    photographs), then cut out the middle. An image of the very size is left alone."""
    if image.size == (width, height):
        return image
    scale = _scale(image.size, height, width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def shown(size: tuple[int, int], height: int, width: int) -> tuple[float, float, float, float]:
    """The part of an image of this (width, height) that ``fit`` shows: left, top, right, bottom in shares of it."""
    if size == (width, height):
        return 0.0, 0.0, 1.0, 1.0
    scale = _scale(size, height, width)
    across, down = width / (scale * size[0]), height / (scale * size[1])
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _scale(size: tuple[int, int], height: int, width: int) -> float:
    rim = 256 / 224 if min(height, width) >= 128 else 1.0
    return max(width * rim / size[0], height * rim / size[1])


def _listing(folder: Path) -> tuple[list[Path], np.ndarray | None, int | None]:
    def images(directory: Path, recursive: bool) -> list[Path]:
        paths = directory.rglob("*") if recursive else directory.iterdir()
        return sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))

    classes = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    per_class = [(d, images(d, True)) for d in classes]
    per_class = [(d, files) for d, files in per_class if files]
    flat = images(folder, False)
    if not per_class:
        if not flat:
            raise DataError(f"{folder}: no images in it; expected {_suffixes()}, in sub-folders for classes, or flat")
        return flat, None, None
    if flat:
        log.warning("%s: %d images beside the class folders are left out", folder, len(flat))
    files = [f for _, found in per_class for f in found]
    labels = np.concatenate([np.full(len(found), i, np.int64) for i, (_, found) in enumerate(per_class)])
    return files, labels, len(per_class)


def _has_header(path: Path) -> bool | None:
    try:
        with Image.open(path):
            return True
    except _BROKEN:
        return None


def _warn_broken(files: Sequence[Path], total: int) -> None:
    if files:
        named = ", ".join(str(f) for f in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        log.warning("%d of %d images cannot be read and are skipped: %s", len(files), total, named)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
