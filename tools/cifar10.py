"""CIFAR-10 as data for the benchmarks: ``--data tools/cifar10.py:calibration`` and so on.

Reads the folder ``cifar10`` below EDGEPRUNE_DATA: ``train_1.webp`` .. ``train_5.webp`` and ``test.webp``, each a
100 x 100 grid of 32 x 32 images, and ``labels.npz`` with ``train`` and ``test``.

    train         45 000 training images, labelled
    validation    the other 5 000, labelled
    calibration   1 024 of the 45 000, unlabelled
    test          the 10 000 test images, labelled

These are for networks trained on ImageNet mean and std (``resnet20``, ``resnet56``); the same names with ``_plain``
are for networks that want numbers between 0 and 1 (``resnet56_proj``).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.errors import DataError
from edgeprune.train.dataset import DataSet

VALIDATION, CALIBRATION = 5000, 1024


def train() -> DataSet:
    return _split("train", "imagenet")


def validation() -> DataSet:
    return _split("validation", "imagenet")


def calibration() -> DataSet:
    return _split("calibration", "imagenet")


def test() -> DataSet:
    return _split("test", "imagenet")


def train_plain() -> DataSet:
    return _split("train", "none")


def validation_plain() -> DataSet:
    return _split("validation", "none")


def calibration_plain() -> DataSet:
    return _split("calibration", "none")


def test_plain() -> DataSet:
    return _split("test", "none")


def _split(name: str, mean: str) -> DataSet:
    kind = "test" if name == "test" else "train"
    images, labels = _images(kind), _labels()[kind]
    if name == "test":
        return DataSet.from_arrays(images, labels, mean=mean, name="CIFAR-10 test")
    order = np.random.default_rng(10).permutation(len(images))
    parts = {"validation": order[:VALIDATION], "train": order[VALIDATION:]}
    if name == "calibration":
        return DataSet.from_arrays(images[parts["train"][:CALIBRATION]], mean=mean, name="CIFAR-10 calibration")
    part = np.sort(parts[name])
    return DataSet.from_arrays(images[part], labels[part], mean=mean, name=f"CIFAR-10 {name}")


@cache
def _images(kind: str) -> np.ndarray:
    """(N, 32, 32, 3) uint8, in the original order."""
    files = ["test.webp"] if kind == "test" else [f"train_{i}.webp" for i in range(1, 6)]
    return np.concatenate([_grid(_folder() / f) for f in files])


@cache
def _labels() -> dict[str, np.ndarray]:
    with np.load(_folder() / "labels.npz") as archive:
        return {k: archive[k].astype(np.int64) for k in ("train", "test")}


def _grid(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels.reshape(100, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(10000, 32, 32, 3)


def _folder() -> Path:
    root = os.environ.get("EDGEPRUNE_DATA")
    folder = Path(root or "") / "cifar10"
    if not root or not folder.is_dir():
        raise DataError("set EDGEPRUNE_DATA to the folder that holds cifar10/ (train_1.webp .. test.webp, labels.npz)")
    return folder
