"""The data factories that ship: splits are disjoint, repeatable, and say what is missing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune.errors import DataError
from edgeprune.train.data import open_data

ROOT = Path(__file__).parents[2]


def everything(spec, shape):
    data = open_data(f"{ROOT}/{spec}", shape)
    return data, torch.cat([x for x, _ in data.batches(500)])


def rows(x):
    return {r.tobytes() for r in x.numpy()}


def test_digits():
    pytest.importorskip("sklearn")
    shape = (1, 1, 32, 32)
    train, x_train = everything("examples/digits/data.py:train", shape)
    test, x_test = everything("examples/digits/data.py:test", shape)
    calibration, x_calibration = everything("examples/digits/data.py:calibration", shape)
    assert (len(train), len(test), train.classes, test.classes) == (1348, 449, 10, 10)
    assert not calibration.labelled
    assert torch.equal(x_calibration, x_train)
    assert not rows(x_train) & rows(x_test)
    assert np.bincount(test.labels).min() >= 42
    assert 0 <= float(x_train.min()) < float(x_train.max()) <= 1
    assert torch.equal(everything("examples/digits/data.py:test", shape)[1], x_test)


@pytest.mark.parametrize("spec", ["tools/cifar10.py:train", "tools/imagenet_samples.py:held_out"])
def test_real_data_that_is_not_there(spec, monkeypatch):
    monkeypatch.delenv("EDGEPRUNE_DATA", raising=False)
    with pytest.raises(DataError, match="set EDGEPRUNE_DATA"):
        open_data(f"{ROOT}/{spec}", (1, 3, 32, 32))


needs_data = pytest.mark.skipif(not os.environ.get("EDGEPRUNE_DATA"), reason="EDGEPRUNE_DATA is not set")


@pytest.mark.slow
@needs_data
def test_cifar10():
    shape = (1, 3, 32, 32)
    names = ("train", "validation", "calibration", "test")
    opened = {n: everything(f"tools/cifar10.py:{n}", shape) for n in names}
    assert [len(opened[n][0]) for n in names] == [45000, 5000, 1024, 10000]
    seen = {n: rows(opened[n][1]) for n in names}
    assert seen["calibration"] < seen["train"]
    assert not seen["train"] & seen["validation"]
    assert not (seen["train"] | seen["validation"]) & seen["test"]
    plain, x = everything("tools/cifar10.py:test_plain", shape)
    assert float(x.min()) == 0
    assert float(x.max()) == 1
    np.testing.assert_allclose((x[0, 2] - 0.406) / 0.225, opened["test"][1][0, 2], atol=1e-5)
    assert plain.labels[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane


@pytest.mark.slow
@needs_data
def test_imagenet_samples():
    held_out, x = everything("tools/imagenet_samples.py:held_out", (1, 3, 224, 224))
    calibration, other = everything("tools/imagenet_samples.py:calibration", (1, 3, 224, 224))
    assert (len(held_out), len(calibration), calibration.labelled) == (125, 125, False)
    assert held_out.labels.tolist() == list(range(4, 1000, 8))
    assert not rows(x) & rows(other)
