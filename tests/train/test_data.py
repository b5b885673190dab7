"""Every way into a DataSet, and what is said when one is closed."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import DataError
from edgeprune.train.data import check_varied, open_data
from edgeprune.train.dataset import DataSet

SHAPE = (1, 3, 8, 10)


def pixels(count, seed=0, height=8, width=10):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def everything(data, **kwargs):
    xs, ys = zip(*data.batches(7, **kwargs), strict=True)
    return torch.cat(xs), None if ys[0] is None else torch.cat(ys)


def write_images(folder, images, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.{suffix}")


def test_folder_of_classes_in_sorted_order(tmp_path):
    for name, seed in (("zebra", 1), ("ant", 2)):
        write_images(tmp_path / name, pixels(3, seed))
    data = open_data(tmp_path, SHAPE)
    x, y = everything(data)
    assert (data.labelled, data.classes, len(data)) == (True, 2, 6)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.concatenate([pixels(3, 2), pixels(3, 1)]).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)


def test_flat_folder_is_unlabelled_and_keeps_file_order(tmp_path):
    write_images(tmp_path, pixels(4))
    data = open_data(str(tmp_path), SHAPE)
    x, y = everything(data)
    assert y is None
    assert not data.labelled
    np.testing.assert_allclose(x.numpy(), pixels(4).transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_images_are_resized_to_cover_and_cut_in_the_middle(tmp_path):
    wide = np.zeros((16, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the middle third is white and exactly what a 16 x 20 cut sees
    write_images(tmp_path, [wide])
    x, _ = everything(open_data(tmp_path, (1, 3, 16, 20)))
    assert x.shape == (1, 3, 16, 20)
    assert float(x.min()) == 1.0
    x, _ = everything(open_data(tmp_path, (1, 3, 8, 10)))
    assert float(x[:, :, :, 1:-1].min()) == 1.0


def test_photographs_get_the_usual_rim(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    write_images(tmp_path, [image])
    x, _ = everything(open_data(tmp_path, (1, 3, 224, 224)))
    np.testing.assert_allclose(x[0].numpy(), image[16:240, 38:262].transpose(2, 0, 1) / 255, atol=1e-6)


def test_grey_images(tmp_path):
    write_images(tmp_path, pixels(1))
    x, _ = everything(open_data(tmp_path, (1, 1, 8, 10)))
    assert x.shape == (1, 1, 8, 10)


def test_broken_images_are_skipped_and_named(tmp_path, caplog):
    write_images(tmp_path / "a", pixels(3))
    write_images(tmp_path / "b", pixels(2))
    (tmp_path / "a" / "001.png").write_bytes((tmp_path / "a" / "000.png").read_bytes()[:60])
    (tmp_path / "b" / "empty.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "edgeprune"):
        data = open_data(tmp_path, SHAPE)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert "2 of 6" in caplog.text
    assert "001.png" in caplog.text
    assert "empty.jpg" in caplog.text


def test_a_file_that_breaks_in_a_large_folder_is_stood_in_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("edgeprune.train.sources.DECODE_AT_OPEN", 0)
    write_images(tmp_path, pixels(3))
    header_only = (tmp_path / "001.png").read_bytes()[:60]
    (tmp_path / "001.png").write_bytes(header_only)
    data = open_data(tmp_path, SHAPE)
    assert len(data) == 3
    x, _ = everything(data)
    assert "001.png" in caplog.text
    torch.testing.assert_close(x[1], x[2])
    assert not torch.equal(x[0], x[2])


@pytest.mark.parametrize("content", [None, "text"])
def test_folder_without_images_is_an_error(tmp_path, content):
    if content:
        (tmp_path / "readme.txt").write_text(content)
    with pytest.raises(DataError, match="no images in it"):
        open_data(tmp_path, SHAPE)


def test_folder_of_broken_images_is_an_error(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of its 1 images"):
        open_data(tmp_path, SHAPE)


@pytest.mark.parametrize(("x_key", "y_key"), [("x", "y"), ("images", "labels")])
def test_npz(tmp_path, x_key, y_key):
    np.savez(tmp_path / "d.npz", **{x_key: pixels(5), y_key: np.arange(5)})
    data = open_data(tmp_path / "d.npz", SHAPE, mean="imagenet")
    x, y = everything(data)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(x.numpy(), ((pixels(5) / 255 - mean) / std).transpose(0, 3, 1, 2), atol=1e-5)
    assert y.tolist() == [0, 1, 2, 3, 4]


def test_npz_of_floats_is_scaled_already(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 10))
    np.savez(tmp_path / "d.npz", x=x)
    got, _ = everything(open_data(tmp_path / "d.npz", SHAPE))
    np.testing.assert_allclose(got.numpy(), x, atol=1e-6)
    got, _ = everything(open_data(tmp_path / "d.npz", SHAPE, mean="0.5", std=2.0))
    np.testing.assert_allclose(got.numpy(), (x - 0.5) / 2, atol=1e-6)


def test_npz_with_a_pickle_in_it_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    np.savez(tmp_path / "d.npz", x=np.array([Payload()], dtype=object))
    with pytest.raises(DataError, match=r"\.npz"):
        open_data(tmp_path / "d.npz", SHAPE)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_broken_npz(tmp_path, damage):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=pixels(20))
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[200:400:3] = bytes(b ^ 255 for b in raw[200:400:3])
    path.write_bytes({"truncated": raw[:500], "flipped": raw, "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(DataError, match=r"\.npz") as error:
        open_data(path, SHAPE)
    assert "\n" not in str(error.value)


def test_npz_without_samples_names_what_it_holds(tmp_path):
    np.savez(tmp_path / "d.npz", weights=pixels(2))
    with pytest.raises(DataError, match="holds weights; expected an array named x or images"):
        open_data(tmp_path / "d.npz", SHAPE)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (pixels(3, height=9), None, "samples are 9x10x3, the network's input is 3x8x10"),
        (pixels(3)[..., :1], None, "samples are 8x10x1, the network's input is 3x8x10"),
        (pixels(3), np.arange(2), "3 samples, but 2 labels"),
        (pixels(3), np.array([0, -1, 2]), "label -1"),
        (pixels(0), None, "no samples"),
        (np.array([["a"]]), None, "type <U1"),
    ],
)
def test_arrays_that_do_not_fit(x, y, message):
    with pytest.raises(DataError, match=message):
        open_data({"x": x} if y is None else {"x": x, "y": y}, SHAPE)


FUNCTIONS = """
import numpy as np, torch
X = np.arange(6 * 8 * 10 * 3, dtype=np.uint8).reshape(6, 8, 10, 3)
T = torch.from_numpy(X).permute(0, 3, 1, 2)
def arrays(): return X, np.arange(6)
def unlabelled(): return X
def batches(): return [T[:4], T[4:]]
def labelled_batches():
    yield T[:4], torch.arange(4)
    yield T[4:], torch.arange(4, 6)
def dataset(): return torch.utils.data.TensorDataset(T, torch.arange(6))
def loader(): return torch.utils.data.DataLoader(dataset(), batch_size=4)
def examples(): return [(x, i) for i, x in enumerate(T)]
def images():
    from PIL import Image
    return [(Image.fromarray(x), i) for i, x in enumerate(X)]
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(zip(T, range(6)))
def stream(): return Stream()
def mapping(): return [{"x": T[:4], "y": torch.arange(4)}, {"x": T[4:], "y": torch.arange(4, 6)}]
def finished():
    from edgeprune.train.dataset import DataSet
    return DataSet.from_arrays(X, np.arange(6), scale=510.0)
def fails(): raise RuntimeError("no network\\nat all")
def fails_late():
    yield T[:4]
    raise KeyError("late")
def nothing(): return None
def empty(): return []
def needs(argument): return X
def boxes(): return [(T, torch.zeros(6, 4))]
number = 3
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return f"{tmp_path}/mine.py"


@pytest.mark.parametrize(
    "name",
    ["arrays", "labelled_batches", "dataset", "loader", "examples", "images", "stream", "mapping", "finished",
     "unlabelled", "batches"],
)  # fmt: skip
def test_functions_of_the_users(functions, name):
    data = open_data(f"{functions}:{name}", SHAPE)
    x, y = everything(data)
    expected = np.arange(6 * 8 * 10 * 3, dtype=np.uint8).reshape(6, 8, 10, 3).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(x.numpy(), expected / (510 if name == "finished" else 255), atol=1e-6)
    assert (y is None) == (name in ("unlabelled", "batches"))
    assert y is None or y.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "RuntimeError: no network at all$"),
        ("fails_late", "KeyError"),
        ("nothing", "NoneType"),
        ("empty", "no batches"),
        ("needs", "TypeError"),
        ("missing", "has no function missing"),
        ("number", "has no function number"),
    ],
)
def test_functions_that_fail_give_one_line(functions, name, message):
    with pytest.raises(DataError, match=message) as error:
        open_data(f"{functions}:{name}", SHAPE)
    assert "\n" not in str(error.value)


def test_labels_that_are_no_classes_are_left_out(functions, caplog):
    assert not open_data(f"{functions}:boxes", SHAPE).labelled
    assert "left out" in caplog.text


def test_function_of_a_module_in_the_working_directory(functions, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert len(open_data("mine:arrays", SHAPE)) == 6


def test_a_file_imports_what_lies_beside_it(functions, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "other.py").write_text("import mine\ndef five(): return mine.X[:5]\n")
    assert len(open_data(f"{tmp_path}/other.py:five", SHAPE)) == 5


@pytest.mark.parametrize("spec", ["nowhere", "nowhere.py:f", "no.such.module:f", "x.npz"])
def test_specs_that_lead_nowhere(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_data(spec, SHAPE)
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(DataError, match="expected a folder of images"):
        open_data(tmp_path / "d.csv", SHAPE)


def test_a_data_set_for_another_input():
    data = DataSet.from_arrays(pixels(3))
    with pytest.raises(DataError, match="3x32x32"):
        open_data(data, (1, 3, 32, 32))


def test_a_shuffling_loader_is_repeatable():
    x = torch.arange(50.0).reshape(50, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8, shuffle=True)
    first, second = (everything(open_data(loader, (1, 1)))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert sorted(first.flatten().tolist()) == list(range(50))


def test_a_stream_is_cut_at_the_limit(monkeypatch, caplog):
    monkeypatch.setattr("edgeprune.train.data.KEEP_BYTES", 3 * 240)

    def endless():
        while True:
            yield pixels(1)

    assert len(open_data(endless(), SHAPE)) == 4
    assert "only its first 4" in caplog.text


def test_a_large_map_style_set_is_read_when_asked_for(monkeypatch):
    monkeypatch.setattr("edgeprune.train.data.KEEP_BYTES", 100)

    class Mine:
        targets = (2, 0, 1)

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return pixels(3)[i], self.targets[i]

    data = open_data(Mine(), SHAPE)
    x, y = everything(data)
    assert y.tolist() == [2, 0, 1]
    np.testing.assert_allclose(x.numpy(), pixels(3).transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_importing_data_does_not_need_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import edgeprune.train.data"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_samples_that_are_all_equal_say_nothing():
    x = torch.rand(1, 3, 4, 4)
    assert check_varied([torch.cat([x, x + 1]), x], "photos") == 3
    assert check_varied([x], "photos") == 1
    assert check_varied([], "photos") == 0
    with pytest.raises(DataError, match="photos: all of its samples are equal"):
        check_varied([torch.cat([x, x]), x], "photos")
