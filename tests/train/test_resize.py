import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgeprune.errors import DataError
from edgeprune.train.config import TrainConfig
from edgeprune.train.data import open_data
from edgeprune.train.dataset import DataSet
from edgeprune.train.evaluate import agreement, output_error
from edgeprune.train.finetune import finetune
from edgeprune.train.resize import resize


@pytest.fixture
def photos():
    return np.random.default_rng(0).integers(0, 256, (20, 24, 32, 3), np.uint8)


@pytest.mark.parametrize("size", [(12, 16), (18, 20), (9, 31)])
def test_pixels_are_those_of_an_image_library(photos, size):
    got = resize(torch.from_numpy(photos).permute(0, 3, 1, 2), size)
    assert got.dtype == torch.uint8
    for ours, photo in zip(got, photos, strict=True):
        theirs = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= 1


def test_a_view_of_arrays(photos):
    data = DataSet.from_arrays(photos, np.arange(20) % 4, mean="imagenet")
    view = data.resized(12, 16)
    assert view.input_shape == (1, 3, 12, 16)
    assert view.full is data
    assert data.full is data
    np.testing.assert_array_equal(view.labels, data.labels)
    x, y = view.batch(np.array([3, 7]))
    full, _ = data.batch(np.array([3, 7]))
    assert y.tolist() == [3, 3]
    torch.testing.assert_close(x, resize(full, (12, 16)), atol=0.51 / 255 / 0.22, rtol=0)  # bytes were rounded
    assert view.resized(24, 32) is data
    assert view.resized(6, 8).full is data


def test_parts_of_a_view_know_their_full_samples(photos):
    view = DataSet.from_arrays(photos, np.arange(20) % 4).resized(12, 16)
    for part in (*view.split(0.25), view.subset(np.array([5, 2]))):
        x, _ = part.raw(np.arange(len(part)))
        full, _ = part.full.raw(np.arange(len(part)))
        assert torch.equal(x, resize(full, (12, 16)))


@pytest.mark.parametrize("pixels", [(300, 200), (150, 400), (144, 144), (160, 160)])
def test_a_folder_shows_the_same_part_of_its_files(tmp_path, pixels):
    """In a picture whose colours are coordinates, the colours at the small view's rim tell what part it shows."""
    width, height = pixels
    ramp = np.zeros((height, width, 3))
    ramp[..., 0], ramp[..., 1] = np.arange(width)[None] * 255 / width, np.arange(height)[:, None] * 255 / height
    Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / "ramp.png")
    data = open_data(tmp_path, (1, 3, 144, 144))
    view = data.resized(96, 96)
    (full, _), (small, _) = data.raw(np.array([0])), view.raw(np.array([0]))
    assert small.shape == (1, 3, 96, 96)
    for channel, along in ((0, 2), (1, 1)):
        lines = []
        for x in (full[0, channel].double(), small[0, channel].double()):
            line = x.mean(2 - along).numpy()
            places = (np.arange(len(line)) + 0.5) / len(line)
            lines.append(np.polyfit(places[3:-3], line[3:-3], 1))
        np.testing.assert_allclose(*lines, atol=1.0)


def test_a_folder_is_resized_from_its_files_not_from_the_full_view(tmp_path):
    fine = np.random.default_rng(0).integers(0, 256, (288, 288, 3), np.uint8)
    Image.fromarray(fine).save(tmp_path / "noise.png")
    view = open_data(tmp_path, (1, 3, 72, 72)).resized(48, 48)
    expected = np.asarray(Image.fromarray(fine).resize((48, 48), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(view.raw(np.array([0]))[0][0].permute(1, 2, 0).numpy(), expected)


def test_samples_without_height_and_width_are_refused():
    with pytest.raises(DataError, match="only images"):
        DataSet.from_arrays(np.zeros((4, 7), np.float32)).resized(2, 2)


class Watched(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv, self.head, self.saw = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, classes), []

    def forward(self, x):
        self.saw.append(x.detach().clone())
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_the_teacher_sees_the_full_picture_and_the_student_the_same_one_smaller(photos):
    torch.manual_seed(0)
    view = DataSet.from_arrays(np.ascontiguousarray(photos), mean="imagenet").resized(12, 16)
    teacher, student = Watched(), Watched()
    finetune(student, teacher, view, TrainConfig(steps=4, batch_size=10, augment="crop+flip", teacher_views=0))
    assert {x.shape[2:] for x in teacher.saw} == {(24, 32)}
    assert {x.shape[2:] for x in student.saw} == {(12, 16)}
    for theirs, ours in zip(teacher.saw[-4:], student.saw[-4:], strict=True):
        torch.testing.assert_close(ours, resize(theirs, (12, 16)))


def test_learning_at_a_smaller_size_helps(photos):
    torch.manual_seed(0)
    noise = np.random.default_rng(0).normal(0, 1, (120, 3, 1, 1)) + np.random.default_rng(1).normal(
        0, 0.3, (120, 3, 16, 16)
    )
    view = DataSet.from_arrays(noise.astype(np.float32)).resized(8, 8)
    teacher, student = Watched().eval(), Watched().eval()
    before = output_error(student, teacher, view)
    finetune(student, teacher, view, TrainConfig(epochs=30, batch_size=20, augment="none", loss="values"))
    assert output_error(student, teacher, view) < 0.1 * before


def test_answers_are_compared_at_each_ones_own_size(photos):
    torch.manual_seed(0)
    view = DataSet.from_arrays(photos, mean="imagenet").resized(12, 16)
    a, b = Watched().eval(), Watched().eval()
    share = agreement(a, b, view)
    with torch.no_grad():
        small, _ = view.batch(np.arange(20))
        full, _ = view.full.batch(np.arange(20))
        assert share == float((a(small).argmax(1) == b(full).argmax(1)).float().mean())
        expected = float((a(small) - b(full)).square().sum() / b(full).square().sum())
    assert output_error(a, b, view) == pytest.approx(expected, rel=1e-5)


def test_labels_alone_teach_at_the_small_size_too(photos):
    student = Watched()
    data = DataSet.from_arrays(photos, np.arange(20) % 3).resized(12, 16)
    finetune(student, None, data, TrainConfig(steps=2, batch_size=10))
    assert {x.shape[2:] for x in student.saw} == {(12, 16)}
