"""The batches of a training run: which samples step ``n`` sees, in which view, read ahead in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from edgeprune.train.augment import Augment, Views
from edgeprune.train.dataset import Batch, DataSet


class Feed:
    """Use as a context manager. Every epoch has an order of its own, drawn from the seed and its number; what does not
    fill a batch is left out. view_of: epoch -> the augmented view it shows."""

    def __init__(
        self, data: DataSet, batch_size: int, seed: int, augment: Augment, view_of: Callable[[int], int]
    ) -> None:
        self.data, self.batch_size, self.seed, self.augment, self.view_of = data, batch_size, seed, augment, view_of
        self.per_epoch = len(data) // batch_size
        self._loader = ThreadPoolExecutor(1)
        self._order: tuple[int, np.ndarray] | None = None
        self._views: tuple[int, Views | None] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.shutdown()

    def positions(self, step: int) -> tuple[np.ndarray, int]:
        """(the samples of a step, their view)."""
        epoch, i = divmod(step, self.per_epoch)
        order = self._order
        if order is None or order[0] != epoch:
            order = self._order = (epoch, self.data.order(self.seed * 1_000_003 + epoch))
        return order[1][i * self.batch_size : (i + 1) * self.batch_size], self.view_of(epoch)

    def load(self, step: int) -> Future[Batch]:
        """The samples of a step as they are stored, augmented, and their labels; not yet scaled."""
        positions, view = self.positions(step)
        if self._views is None or self._views[0] != view:
            self._views = (view, self.augment.views(len(self.data), view) if self.augment else None)
        return self._loader.submit(self.data.raw, positions, self._views[1])
