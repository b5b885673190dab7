"""Arrays from anywhere, checked and brought to the network's layout."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from edgeprune.errors import DataError
from edgeprune.train.sources import ArraySource

log = logging.getLogger("edgeprune")


def arrays_to_source(x: Any, y: Any, shape: tuple[int, ...], name: str) -> ArraySource:
    samples = as_samples(as_tensor(x, name), shape, name)
    if len(samples) == 0:
        raise DataError(f"{name}: it holds no samples; expected at least one")
    return ArraySource(samples, None if y is None else as_labels(y, len(samples), name))


def shape_of(x: Any, name: str) -> tuple[int, ...]:
    """The input shape that an array's samples have: uint8 images are NHWC (or NHW), floats NCHW."""
    x = as_tensor(x, name)
    if x.dtype == torch.uint8 and x.dim() == 4:
        return 1, x.shape[3], x.shape[1], x.shape[2]
    if x.dtype == torch.uint8 and x.dim() == 3:
        return 1, 1, x.shape[1], x.shape[2]
    return 1, *x.shape[1:]


def as_tensor(value: Any, name: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.dtype == object or array.dtype.kind not in "uifb":
            raise DataError(f"{name}: samples have type {array.dtype}; expected uint8 or float numbers")
        value = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    return value if value.dtype == torch.uint8 else value.to(torch.float32)


def as_samples(x: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """(N, ...) in the network's layout."""
    want = tuple(shape[1:])
    got = tuple(x.shape[1:])
    if len(want) == 3:
        channels, height, width = want
        last = (height, width, channels)
        if got == last and (got != want or x.dtype == torch.uint8):
            return x.permute(0, 3, 1, 2).contiguous()
        if channels == 1 and got == (height, width):
            return x.unsqueeze(1)
    if got != want:
        also = f" (or {shape_text((want[1], want[2], want[0]))}, channels last)" if len(want) == 3 else ""
        raise DataError(f"{name}: samples are {shape_text(got)}, the network's input is {shape_text(want)}{also}")
    return x.contiguous()


def as_labels(y: Any, count: int, name: str) -> np.ndarray | None:
    """(N,) int64 class numbers; anything else (boxes, masks, soft targets) is no class label and is left out."""
    array = np.asarray(y.detach().cpu() if isinstance(y, torch.Tensor) else y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "ui":
        log.warning(
            "%s: labels are %s of shape %s, not one class number each: left out", name, array.dtype, array.shape
        )
        return None
    if len(array) != count:
        raise DataError(f"{name}: {count} samples, but {len(array)} labels")
    if array.min() < 0:
        raise DataError(f"{name}: label {int(array.min())} found; expected class numbers from 0")
    return array.astype(np.int64)


def shape_text(shape: Iterable[int]) -> str:
    return "x".join(str(d) for d in shape)
