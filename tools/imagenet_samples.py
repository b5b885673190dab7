"""250 sample photographs of ImageNet, one per fourth class: ``--data tools/imagenet_samples.py:calibration``.

Reads ``imagenet/images/NNNN.jpg`` below EDGEPRUNE_DATA, NNNN being the class (0000, 0004, ..., 0996). The middle
224 x 224 pixels, ImageNet mean and std. Every other image calibrates (unlabelled); those in between are held out
(labelled). They come from ImageNet at large, so their accuracy compares two networks and says nothing absolute.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.errors import DataError
from edgeprune.train.dataset import DataSet
from edgeprune.train.sources import fit

SIZE = 224


def calibration() -> DataSet:
    """125 images: numbers 0, 2, 4, ... of the 250."""
    images, _ = _images(0)
    return DataSet.from_arrays(images, mean="imagenet", name="ImageNet samples for calibration")


def held_out() -> DataSet:
    """The other 125, with their classes 0..999."""
    images, labels = _images(1)
    return DataSet.from_arrays(images, labels, mean="imagenet", name="ImageNet samples held out")


def _images(first: int) -> tuple[np.ndarray, np.ndarray]:
    root = os.environ.get("EDGEPRUNE_DATA")
    files = sorted((Path(root or "") / "imagenet" / "images").glob("*.jpg")) if root else []
    if not files:
        raise DataError("set EDGEPRUNE_DATA to the folder that holds imagenet/images/NNNN.jpg")
    chosen = files[first::2]
    pixels = [np.asarray(fit(Image.open(f).convert("RGB"), SIZE, SIZE)) for f in chosen]
    return np.stack(pixels), np.array([int(f.stem) for f in chosen])
