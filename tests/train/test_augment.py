"""Crops and flips, against a slow and plain version; what "auto" leaves out."""

import numpy as np
import pytest
import torch

from edgeprune.train.augment import Augment, chosen, suggested


def shifted(image, dy, dx):
    out = np.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                out[:, y, x] = image[:, y - dy, x - dx]
    return out


def test_views_shift_and_flip_each_image_its_own_way():
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 9, 11), dtype=np.uint8)
    views = Augment(pad=2, flip=True, seed=5).views(40, 3)
    positions = np.array([7, 0, 39, 12, 7])
    got = views.apply(torch.from_numpy(images[positions]), positions).numpy()
    for out, p in zip(got, positions, strict=True):
        image = images[p][:, :, ::-1] if views.flips[p] else images[p]
        np.testing.assert_array_equal(out, shifted(image, *views.shifts[p]))
    assert 5 < views.flips.sum() < 35
    assert set(views.shifts.flatten().tolist()) == {-2, -1, 0, 1, 2}


def test_a_view_depends_on_seed_and_number_only():
    def shifts(seed, view):
        return Augment(pad=3, seed=seed).views(50, view).shifts

    np.testing.assert_array_equal(shifts(1, 2), shifts(1, 2))
    assert (shifts(1, 2) != shifts(1, 3)).any()
    assert (shifts(1, 2) != shifts(2, 2)).any()
    assert not Augment(pad=3).views(50, 0).flips.any()


@pytest.mark.parametrize(
    ("shape", "pad"),
    [
        ((1, 3, 32, 32), 4),
        ((1, 3, 224, 192), 24),
        ((1, 1, 8, 8), 1),
        ((1, 16, 32, 32), 0),
        ((1, 3, 4, 4), 0),
        ((1, 9), 0),
    ],
)
def test_only_what_looks_like_an_image_is_augmented(shape, pad):
    augment = suggested(shape)
    assert augment.pad == pad
    assert augment.flip == (pad > 0)


def brighter_half(x):
    """A network that a mirror fools: which half of the image is brighter."""
    middle = x.shape[3] // 2
    return torch.stack([x[:, :, :, :middle].sum((1, 2, 3)), x[:, :, :, middle:].sum((1, 2, 3))], 1)


def test_auto_keeps_what_the_classes_survive():
    shape, x = (1, 3, 16, 16), torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:32, :, :, 2:6] += 3
    x[32:, :, :, 10:14] += 3
    augment, note = chosen("auto", shape, 0, x, brighter_half)
    assert (augment.pad, augment.flip) == (2, False)
    assert "flip (it changes 100%" in note
    augment, note = chosen("auto", shape, 0, x, lambda x: torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1))
    assert (augment.pad, augment.flip, note) == (2, True, "")


def test_modes():
    x = torch.zeros(2, 3, 16, 16)
    modes = {m: chosen(m, (1, 3, 16, 16), 0, x, lambda x: None)[0] for m in ("none", "crop", "crop+flip", "auto")}
    assert {m: (a.pad, a.flip) for m, a in modes.items()} == {
        "none": (0, False),
        "crop": (2, False),
        "crop+flip": (2, True),
        "auto": (2, True),
    }
    assert not modes["none"]
