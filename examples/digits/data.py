"""The handwritten digits that come with scikit-learn, as data: ``--data examples/digits/data.py:train``.

1 797 scans of 8 x 8 pixels in 17 grey levels (UCI "Optical Recognition of Handwritten Digits"), enlarged to
1 x 32 x 32.

    train         1 348 scans, labelled
    calibration   the same without their labels
    test          the other 449, labelled
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from edgeprune.errors import DataError
from edgeprune.train.dataset import DataSet

SIZE = 32
TEST_SHARE = 0.25


def train() -> DataSet:
    return _digits(labelled=True).split(TEST_SHARE, seed=0)[0]


def calibration() -> DataSet:
    # split with the labels, so that these are the very scans of ``train``
    positions = train().indices
    return _digits(labelled=False).subset(positions)


def test() -> DataSet:
    return _digits(labelled=True).split(TEST_SHARE, seed=0)[1]


def _digits(labelled: bool) -> DataSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from None
    scans = load_digits()
    grey = torch.from_numpy(scans.images.astype(np.float32))[:, None] * (255 / 16)
    large = functional.interpolate(grey, (SIZE, SIZE), mode="bilinear").round().clamp(0, 255).to(torch.uint8)
    labels = scans.target.astype(np.int64) if labelled else None
    return DataSet.from_arrays(large, labels, input_shape=(1, 1, SIZE, SIZE), name="handwritten digits")
