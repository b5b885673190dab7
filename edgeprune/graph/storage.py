"""Tensors out of raw bytes that nobody vouches for: every view is checked against what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from edgeprune.errors import ModelFileError

_SPARE_VALUES = 1 << 24  # that views may show beyond what is stored
DTYPES: dict[str, torch.dtype] = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Bool": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


MakeTensor = Callable[[Storage, int, tuple[int, ...], tuple[int, ...]], torch.Tensor]


class Storages:
    """The raw bytes of an archive's tensors, each read once, and the views of them.

    Equal views are one tensor (tied weights). All views together may not show much more than is stored: a thousand
    names for one large storage would each be copied when converted to single precision.
    """

    def __init__(self, read: Callable[[str], bytes]):
        self._read = read
        self._bytes: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}
        self._spare = _SPARE_VALUES

    def tensor(
        self, name: str, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> torch.Tensor:
        """Raises ModelFileError when the view does not lie within the storage."""
        if name not in self._bytes:
            data = self._read(name)
            self._bytes[name] = raw_bytes(data)
            self._spare += 2 * len(data)
        key = (name, dtype, offset, size, stride)
        if key not in self._views:
            self._views[key] = made = tensor_from(self._bytes[name], dtype, offset, size, stride)
            self._spare -= made.numel()
            if self._spare < 0:
                raise ModelFileError("the tensors claim far more values than are stored")
        return self._views[key]


def tensor_from(
    data: torch.Tensor, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A view of raw bytes (uint8, one dimension). Raises ModelFileError when it does not lie within them."""
    if len(size) != len(stride) or offset < 0 or min((*size, *stride, 0)) < 0:
        raise ModelFileError(f"a tensor claims size {size}, stride {stride}, offset {offset}")
    numel, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        numel *= n
        last += (n - 1) * step
    available = data.numel() // dtype.itemsize
    if numel and (last >= available or numel > available + _SPARE_VALUES):
        raise ModelFileError(f"a tensor of size {size} claims more than the {available} values that are stored")
    if not numel:
        return torch.empty(size, dtype=dtype)
    return data[: available * dtype.itemsize].view(dtype).as_strided(size, stride, offset)


def raw_bytes(data: bytes) -> torch.Tensor:
    """Bytes as a one-dimensional uint8 tensor of its own memory."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def shapes_only(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """A MakeTensor that keeps shape and dtype and no values."""
    return torch.empty(size, dtype=storage.dtype, device="meta")


def stored_tensors(read: Callable[[str], bytes]) -> MakeTensor:
    """A MakeTensor on the storages that ``read`` gives by key."""
    storages = Storages(read)

    def make(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        return storages.tensor(storage.key, storage.dtype, offset, size, stride)

    return make
