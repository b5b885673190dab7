"""Data as the rest of edgeprune sees it.

Shapes: samples leave here as float32 (N, C, H, W) (or (N, ...) for other inputs), labels as int64 (N,).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from edgeprune.errors import DataError
from edgeprune.train.arrays import arrays_to_source, shape_of
from edgeprune.train.augment import Augment, Views, suggested
from edgeprune.train.normalise import Normalisation, Statistic
from edgeprune.train.resize import resize, resized
from edgeprune.train.sources import Source

Batch = tuple[torch.Tensor, torch.Tensor | None]


class DataSet:
    """Samples, their labels if there are any, and how they are scaled. Positions run from 0 to ``len(data) - 1``.

    labelled: every sample has an integer class. classes: how many, or None. input_shape: (1, C, H, W).
    full: the same samples at the size the data came in; the data itself unless it is a ``resized`` view
    """

    def __init__(
        self,
        source: Source,
        input_shape: Sequence[int],
        normalisation: Normalisation,
        name: str,
        indices: np.ndarray | None = None,
        full: DataSet | None = None,
    ):
        self.source = source
        self.input_shape = (1, *(int(d) for d in input_shape[1:]))
        self.normalisation = normalisation
        self.name = name
        self.full = self if full is None else full
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
        if len(self.indices) == 0:
            raise DataError(f"{name}: no samples left; expected at least one")

    @staticmethod
    def from_arrays(
        x: Any,
        y: Any = None,
        *,
        input_shape: Sequence[int] | None = None,
        mean: Statistic = None,
        std: Statistic = None,
        scale: float = 255.0,
        name: str = "arrays",
    ) -> DataSet:
        """x: (N, H, W, C) or (N, C, H, W) uint8 or float, numpy or torch; y: (N,) integer classes or None.

        Without ``input_shape`` uint8 is taken as NHWC and float as NCHW. Raises DataError.
        """
        shape = shape_of(x, name) if input_shape is None else tuple(input_shape)
        normalisation = Normalisation.parse(mean, std, scale, shape[1])
        return DataSet(arrays_to_source(x, y, shape, name), shape, normalisation, name)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labelled(self) -> bool:
        return self.source.labels is not None

    @property
    def classes(self) -> int | None:
        return self.source.classes if self.labelled else None

    @property
    def labels(self) -> np.ndarray | None:
        """(N,) int64, in the order of positions."""
        return None if self.source.labels is None else self.source.labels[self.indices]

    def raw(self, positions: np.ndarray, views: Views | None = None) -> Batch:
        """The samples at these positions as they are stored, one batch; ``views`` (of the whole data) augments them."""
        positions = np.asarray(positions, np.int64)
        x = self.source.read(self.indices[positions])
        if views is not None:
            x = views.apply(x, positions)
        labels = self.labels
        return x, None if labels is None else torch.from_numpy(labels[positions])

    def batch(self, positions: np.ndarray, views: Views | None = None) -> Batch:
        """The same, scaled as the network expects it: float32."""
        x, y = self.raw(positions, views)
        return self.normalisation(x), y

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """A batch of ``full``, augmented and scaled or not, at this view's size."""
        return x if self.full is self else resize(x, self.input_shape[2:])

    def order(self, shuffle_seed: int | None) -> np.ndarray:
        """All positions; in order, or in an order that depends on the seed alone."""
        if shuffle_seed is None:
            return np.arange(len(self))
        return np.random.default_rng((shuffle_seed, 11)).permutation(len(self))

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        limit: int | None = None,
        augment: bool | Augment = False,
    ) -> Iterator[Batch]:
        """(x, y or None) batches, the last one may be smaller; the same for the same arguments.

        limit: at most this many samples. From data sorted by class take them with a ``shuffle_seed``.
        """
        if batch_size < 1:
            raise DataError(f"batch size is {batch_size}; expected at least 1")
        if augment is True:
            augment = suggested(self.input_shape, shuffle_seed or 0)
        views = augment.views(len(self), 0) if augment else None
        order = self.order(shuffle_seed)[:limit]
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], views)

    def subset(self, positions: np.ndarray) -> DataSet:
        full = None if self.full is self else self.full.subset(positions)
        return DataSet(self.source, self.input_shape, self.normalisation, self.name, self.indices[positions], full)

    def resized(self, height: int, width: int) -> DataSet:
        """The same samples at another size: folders are read again from the files' pixels, everything else is
        interpolated with antialiasing. Raises DataError unless the samples are (C, H, W)."""
        if len(self.input_shape) != 4:
            raise DataError(f"{self.name}: only images can be resized, its samples have shape {self.input_shape[1:]}")
        if (height, width) == self.full.input_shape[2:]:
            return self.full
        shape = (*self.input_shape[:2], height, width)
        source = resized(self.full.source, (height, width))
        return DataSet(source, shape, self.normalisation, self.name, self.indices, self.full)

    def split(self, fraction: float, seed: int = 0) -> tuple[DataSet, DataSet]:
        """Two disjoint parts (rest, part): ``part`` holds ``fraction`` of the samples, of each class if labelled."""
        if not 0 < fraction < 1:
            raise DataError(f"{self.name}: a part of {fraction:g} was asked for; expected more than 0 and less than 1")
        rng = np.random.default_rng((seed, 23))
        labels = self.labels
        groups = [np.arange(len(self))] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
        chosen, owed = [], 0.5
        for group in groups:
            owed += fraction * len(group)  # what rounding takes from one class it gives to the next
            count = min(int(owed), len(group))
            owed -= count
            chosen.append(rng.permutation(group)[:count])
        part = np.sort(np.concatenate(chosen))
        rest = np.setdiff1d(np.arange(len(self)), part)
        if len(part) == 0 or len(rest) == 0:
            raise DataError(f"{self.name}: {len(self)} samples cannot be split into parts of {fraction:g} and the rest")
        return self.subset(rest), self.subset(part)
