"""The way in: ``open_data`` turns whatever the user names (a folder, an ``.npz``, a function, arrays, a torch data set,
an iterable of batches) into a DataSet."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.errors import DataError
from edgeprune.train.arrays import arrays_to_source, as_labels, as_samples, as_tensor, shape_text
from edgeprune.train.dataset import DataSet
from edgeprune.train.normalise import Normalisation, Statistic
from edgeprune.train.sources import ArraySource, FolderSource, MapSource, Source

log = logging.getLogger("edgeprune")

X_KEYS = ("x", "images")
Y_KEYS = ("y", "labels")
KEEP_BYTES = 2 << 30  # what is given as a stream is kept in memory up to this size
_FORMS = "expected a folder of images, an .npz file, file.py:function or package.module:function"


def open_data(
    spec: Any,
    input_shape: Sequence[int],
    *,
    mean: Statistic = None,
    std: Statistic = None,
    scale: float = 255.0,
) -> DataSet:
    """Open what the user names as data for a network whose input is ``input_shape`` (batch in front, any value).

    spec: a folder of images; an ``.npz`` (``x`` or ``images``, optionally ``y`` or ``labels``); ``file.py:function``
        or ``package.module:function`` that returns a DataSet, (x, y) arrays, a torch data set or loader, or an
        iterable of batches; or, from Python, any of these objects itself.
    mean, std: ``imagenet``, ``none``, or numbers (see Normalisation). Integers are divided by ``scale`` first.
    Raises DataError.
    """
    shape = (1, *(int(d) for d in input_shape[1:]))
    if len(shape) < 2:
        raise DataError(f"input shape is {tuple(input_shape)}; expected the batch and at least one more dimension")
    normalisation = Normalisation.parse(mean, std, scale, shape[1])
    opened, name = _opened(spec, shape)
    if isinstance(opened, DataSet):
        if opened.input_shape != shape:
            found = shape_text(opened.input_shape)
            raise DataError(
                f"{name}: its samples are {found}, the network's input is {shape_text(shape)}: "
                f"change the data, or say --input {found}"
            )
        if mean is not None or std is not None:
            opened = DataSet(opened.source, shape, normalisation, name, opened.indices)
        return opened
    return DataSet(opened, shape, normalisation, name)


def check_varied(batches: Sequence[torch.Tensor], name: str) -> int:
    """How many samples the batches ((n, ...) each) hold. Raises DataError when there are several and all are equal:
    nothing can be chosen or fitted by them."""
    first = batches[0][:1] if batches else None
    if first is not None and sum(map(len, batches)) > 1 and all(bool((x == first).all()) for x in batches):
        raise DataError(f"{name}: all of its samples are equal; expected images like those that the network will see")
    return sum(map(len, batches))


def _opened(spec: Any, shape: tuple[int, ...]) -> tuple[Any, str]:
    """-> (a Source or a DataSet, its name for messages). Raises DataError."""
    if isinstance(spec, (str, os.PathLike)):
        text = os.fspath(spec)
        path = Path(text)
        if path.is_dir():
            if len(shape) != 4:
                raise DataError(
                    f"{text}: a folder of images feeds inputs of 4 dimensions, not {shape_text(shape)}: use .npz"
                )
            return FolderSource(path, (shape[1], shape[2], shape[3])), text
        if path.is_file():
            if path.suffix == ".npz":
                return _npz(path, shape), text
            raise DataError(f"{text}: not data that can be opened; {_FORMS}")
        module, colon, function = text.rpartition(":")
        if colon and module and function.isidentifier():
            return _called(module, function, shape), text
        raise DataError(f"{text}: no such file or folder; {_FORMS}")
    return _to_source(spec, shape, "data"), "data"


def _to_source(value: Any, shape: tuple[int, ...], name: str) -> Any:
    """Whatever a function returned, or the API was given, as a Source (or a DataSet as it is)."""
    if isinstance(value, (DataSet, ArraySource, FolderSource, MapSource)):
        return value
    if isinstance(value, Mapping):
        return arrays_to_source(_pick(value, X_KEYS, name), _pick(value, Y_KEYS, name, False), shape, name)
    if _is_array(value):
        return arrays_to_source(value, None, shape, name)
    if isinstance(value, (tuple, list)) and len(value) == 2 and _whole(value[0], value[1]):
        return arrays_to_source(value[0], value[1], shape, name)
    if isinstance(value, torch.utils.data.IterableDataset):
        return _stream(value, shape, name)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (tuple, list)):
        return _map_style(value, shape, name)
    if isinstance(value, Iterable):
        return _stream(value, shape, name)
    if callable(value):
        return _to_source(value(), shape, name)
    raise DataError(f"{name}: got {type(value).__name__}; expected a data set, arrays (x, y) or an iterable of batches")


def _npz(path: Path, shape: tuple[int, ...]) -> ArraySource:
    try:
        with np.load(path, allow_pickle=False) as archive:
            x = _pick(archive, X_KEYS, str(path))
            return arrays_to_source(x, _pick(archive, Y_KEYS, str(path), False), shape, str(path))
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: cannot be read as .npz ({reason}); write it with numpy.savez(file, x=..., y=...)"
        ) from None


def _pick(archive: Any, keys: tuple[str, ...], name: str, needed: bool = True) -> Any:
    for key in keys:
        if key in archive:
            return archive[key]
    if needed:
        found = ", ".join(sorted(str(k) for k in archive)) or "nothing"
        raise DataError(f"{name}: holds {found}; expected an array named {' or '.join(keys)}")
    return None


def _called(module_name: str, function_name: str, shape: tuple[int, ...]) -> Any:
    spec = f"{module_name}:{function_name}"
    try:
        if module_name.endswith(".py"):
            path = Path(module_name).resolve()
            if not path.is_file():
                raise DataError(f"{spec}: no file {module_name}; {_FORMS}")
            known = f"_edgeprune_data_{path.stem}"
            module_spec = importlib.util.spec_from_file_location(known, path)
            assert module_spec is not None
            assert module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[known] = module  # dataclasses and pickles of the user's look their module up there
            _import_from(path.parent)
            module_spec.loader.exec_module(module)
        else:
            _import_from(Path.cwd())
            module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise DataError(f"{spec}: {module_name} has no function {function_name}")
        return _to_source(function(), shape, spec)
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{spec} failed with {type(error).__name__}: {reason}") from error


def _import_from(folder: Path) -> None:
    """What lies beside the user's file, or in the working directory, can be imported as in a script."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _whole(x: Any, y: Any) -> bool:
    """(x, y) of the whole data set, and not two batches in a list."""
    return _is_array(x) and (y is None or (_is_array(y) and y.ndim == 1 and len(x) == len(y) and x.ndim > 1))


def _item(item: Any, name: str) -> tuple[torch.Tensor, Any]:
    """One element of a data set or a stream -> (x, y or None)."""
    if isinstance(item, Mapping):
        return as_tensor(_pick(item, X_KEYS, name), name), _pick(item, Y_KEYS, name, False)
    if isinstance(item, (tuple, list)) and item:
        return as_tensor(item[0], name), item[1] if len(item) > 1 else None
    return as_tensor(item, name), None


def _map_style(items: Any, shape: tuple[int, ...], name: str) -> Source:
    """A torch-style data set of single samples; kept in memory unless it is too large."""
    if len(items) == 0:
        raise DataError(f"{name}: it holds no samples; expected at least one")
    first, _ = _item(items[0], name)
    if len(items) * first.numel() * first.element_size() <= KEEP_BYTES:
        return _stream((items[i] for i in range(len(items))), shape, name)

    def take(item: Any) -> tuple[torch.Tensor, Any]:
        x, y = _item(item, name)
        return as_samples(x[None], shape, name)[0], y

    targets = getattr(items, "targets", None)
    labels = None if targets is None else as_labels(targets, len(items), name)
    return MapSource(items, take, labels)


def _stream(stream: Iterable[Any], shape: tuple[int, ...], name: str) -> ArraySource:
    """Batches or single samples, kept in memory; drawn with a fixed seed, so that a shuffling loader is repeatable."""
    xs: list[torch.Tensor] = []
    ys: list[np.ndarray] = []
    kept = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for item in stream:
            x, y = _item(item, name)
            single = _is_single(x, shape)
            xs.append(as_samples(x[None] if single else x, shape, name))
            if y is not None:
                ys.append(np.asarray(y.cpu() if isinstance(y, torch.Tensor) else y)[None if single else ...])
            kept += xs[-1].numel() * xs[-1].element_size()
            if kept > KEEP_BYTES:
                log.warning("%s: only its first %d samples are used", name, sum(len(x) for x in xs))
                break
    if not xs:
        raise DataError(f"{name}: it yields no batches; expected at least one")
    if len({x.dtype for x in xs}) > 1:
        raise DataError(f"{name}: some batches are uint8 and some float; expected one type")
    samples = torch.cat(xs)
    labels = None
    if len(ys) == len(xs):
        try:
            labels = as_labels(np.concatenate(ys), len(samples), name)
        except ValueError:
            log.warning("%s: labels of different shapes are no class numbers: left out", name)
    return ArraySource(samples, labels)


def _is_single(x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """One sample and not a batch of them."""
    got, want = tuple(x.shape), tuple(shape[1:])
    last = (*want[1:], want[0]) if len(want) == 3 else want
    return got in (want, last) or (len(want) == 3 and want[0] == 1 and got == want[1:])
