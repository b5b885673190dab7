"""Channel labels: integers that say which channels must stay or go together.

A *unit* is an equivalence class of integers (union-find). Unit 0 is *frozen*: it is never cut, and what is united with
it is frozen too. ``Labels`` gives every element of one tensor its integer. One invariant keeps everything simple: the
labels of a tensor vary along **one** axis at most. Where an operator would make them vary along several (a view that
splits the channels, a stack), elements are united until they do not; the survivors of any cut then form a box, which
is what a tensor can hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch


class Units:
    """Union-find over integers, vectorised; 0 is the frozen unit."""

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self.count = 1

    def fresh(self, count: int) -> np.ndarray:
        """(count,) new integers, each a unit of its own."""
        start, self.count = self.count, self.count + count
        while self.count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
        ids = np.arange(start, self.count)
        self._parent[ids] = ids
        return ids

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The representative of each integer's unit, same shape."""
        roots = self._parent[ids]
        while True:
            up = self._parent[roots]
            if np.array_equal(up, roots):
                break
            roots = up
        self._parent[ids] = roots
        return roots

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Unite a[i] with b[i] for every i (shapes broadcast)."""
        a, b = (x.ravel() for x in np.broadcast_arrays(a, b))
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            # of several writes to one root the last wins; the others are seen again in the next round
            self._parent[np.maximum(a, b)] = np.minimum(a, b)

    def freeze(self, ids: np.ndarray) -> None:
        self.unite(ids, np.zeros(1, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one tensor at batch 1. ``ids``: (shape[axis],), the integer of every position along ``axis``;
    ``axis`` None means frozen throughout."""

    shape: tuple[int, ...]
    axis: int | None = None
    ids: np.ndarray | None = None

    def vector(self, axis: int) -> np.ndarray:
        """(shape[axis],): the ids if they vary along ``axis``, else zeros (frozen)."""
        return self.ids if self.axis == axis and self.ids is not None else np.zeros(self.shape[axis], dtype=np.int64)

    def tensor(self) -> torch.Tensor:
        """int64, of ``shape``; stride 0 along every dim but ``axis``."""
        if self.axis is None or self.ids is None:
            return torch.zeros((), dtype=torch.int64).expand(self.shape)
        one = [1] * len(self.shape)
        one[self.axis] = -1
        return torch.from_numpy(self.ids).view(one).expand(self.shape)


def frozen(shape: Iterable[int]) -> Labels:
    return Labels(tuple(int(s) for s in shape))


def along(units: Units, shape: Iterable[int], axis: int, ids: np.ndarray) -> Labels:
    """Labels that vary along ``axis``. A tensor whose channels are all one unit cannot be cut without vanishing, so
    that unit is frozen."""
    shape = tuple(int(s) for s in shape)
    roots = units.find(ids)
    if roots.size == 0 or (roots == roots[0]).all():
        units.freeze(roots)
        return Labels(shape)
    return Labels(shape, axis, roots)


def from_tensor(units: Units, tensor: torch.Tensor, allow_first: bool, prefer: int | None = None) -> Labels:
    """Labels of a tensor of integers, uniting elements until they vary along one axis only.

    ``prefer`` is kept if the labels vary along it, else the axis with most distinct labels; of equals the last (a
    channel shuffle's offset within its group, which is what grouped convolutions couple too). allow_first: whether
    dim 0 may be that axis; it is the batch otherwise.
    """
    shape = tuple(tensor.shape)
    core = tensor
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and shape[dim] > 1:
            core = core.narrow(dim, 0, 1)
    if core.numel() == 0:
        return Labels(shape)
    ids = units.find(core.numpy())
    dims = [d for d in range(ids.ndim) if ids.shape[d] > 1 and (ids != ids.take([0], axis=d)).any()]
    usable = [d for d in dims if d > 0 or allow_first]
    if not usable:
        units.freeze(np.unique(ids))
        return Labels(shape)

    def distinct(dim: int) -> int:
        line = np.moveaxis(ids, dim, -1).reshape(-1, ids.shape[dim])[0]
        return len(np.unique(line))

    axis = max(usable, key=lambda d: (d == prefer, distinct(d), d))
    rows = np.moveaxis(ids, axis, -1).reshape(-1, ids.shape[axis])
    if len(dims) > 1:
        units.unite(rows, rows[0])
    return along(units, shape, axis, rows[0])
