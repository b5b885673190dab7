"""Batches and splits are repeatable, complete and disjoint; scaling does what its numbers say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import DataError
from edgeprune.train.dataset import DataSet
from edgeprune.train.normalise import Normalisation


def numbered(count, classes=None):
    """Sample i holds the number i everywhere."""
    x = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, 3, 8, 8)).copy()
    return DataSet.from_arrays(x, None if classes is None else np.arange(count) % classes)


def ids(data, size=7, **kwargs):
    return [i for x, _ in data.batches(size, **kwargs) for i in x[:, 0, 0, 0].int().tolist()]


def test_batches_in_order_and_shuffled():
    data = numbered(20)
    assert ids(data) == list(range(20))
    shuffled = ids(data, shuffle_seed=3)
    assert sorted(shuffled) == list(range(20))
    assert shuffled == ids(data, shuffle_seed=3) != ids(data, shuffle_seed=4)
    assert ids(data, size=3, limit=8, shuffle_seed=3) == shuffled[:8]
    assert [len(x) for x, _ in data.batches(6)] == [6, 6, 6, 2]


def test_labels_follow_their_samples():
    data = numbered(30, classes=7)
    for x, y in data.batches(4, shuffle_seed=1):
        assert (x[:, 0, 0, 0].int() % 7).tolist() == y.tolist()
    assert (data.classes, data.input_shape) == (7, (1, 3, 8, 8))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.floats(0.02, 0.98), st.integers(0, 5), st.sampled_from([None, 1, 2, 5]))
def test_split_is_disjoint_complete_stratified_and_repeatable(count, fraction, seed, classes):
    data = numbered(count, classes)
    try:
        rest, part = data.split(fraction, seed)
    except DataError:
        assert round(fraction * count) in (0, count)
        return
    assert sorted(ids(rest) + ids(part)) == list(range(count))
    assert abs(len(part) - fraction * count) <= 1
    assert ids(part) == ids(data.split(fraction, seed)[1])
    if classes is not None:
        share = np.bincount(part.labels, minlength=classes) - fraction * np.bincount(data.labels, minlength=classes)
        assert np.abs(share).max() <= 1.5


def test_split_of_a_split_stays_inside():
    rest, part = numbered(100, 4).split(0.3, 0)
    inner, outer = part.split(0.5, 1)
    assert sorted(ids(inner) + ids(outer)) == ids(part)
    assert not set(ids(inner)) & set(ids(rest))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 2])
def test_split_refuses_impossible_parts(fraction):
    with pytest.raises(DataError, match="part of"):
        numbered(10).split(fraction)


def test_batch_size_zero():
    with pytest.raises(DataError, match="batch size"):
        next(numbered(3).batches(0))


def test_augmented_batches_are_repeatable_and_different():
    data = DataSet.from_arrays(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    plain, first, second, other = (
        torch.cat([x for x, _ in data.batches(5, shuffle_seed=seed, augment=augment)])
        for seed, augment in ((1, False), (1, True), (1, True), (2, True))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        (None, None, [0.2, 0.4, 0.6]),
        ("none", None, [0.2, 0.4, 0.6]),
        ("imagenet", None, [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.6 - 0.406) / 0.225]),
        ("0.1,0.2,0.3", "0.5", [0.2, 0.4, 0.6]),
        ((0.1, 0.2, 0.3), (1, 1, 1), [0.1, 0.2, 0.3]),
        (0.5, 0.5, [-0.6, -0.2, 0.2]),
    ],
)
def test_normalisation(mean, std, expected):
    x = torch.tensor([51, 102, 153], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    got = Normalisation.parse(mean, std, 255.0, 3)(x)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got[1, :, 3, 4].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std", "scale", "message"),
    [
        ("imagnet", None, 255, "expected none, imagenet"),
        ("imagenet", 0.5, 255, "brings its own std"),
        ((0.1, 0.2), None, 255, "2 numbers"),
        (0, 0, 255, "positive"),
        (None, None, 0, "positive"),
    ],
)
def test_normalisation_refuses(mean, std, scale, message):
    with pytest.raises(DataError, match=message):
        Normalisation.parse(mean, std, scale, 3)


def test_imagenet_statistics_need_three_channels():
    with pytest.raises(DataError, match="1 channels"):
        Normalisation.parse("imagenet", None, 255, 1)
