"""How good a network is on data: top-1 with labels, agreement with the original and error of its outputs without."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from edgeprune.errors import DataError
from edgeprune.train.dataset import DataSet
from edgeprune.train.loss import Outputs, as_outputs, check_labels, is_scores

BATCH = 250


def evaluate(module: nn.Module, data: DataSet, *, batch_size: int = BATCH, limit: int | None = None) -> float | None:
    """Top-1 accuracy in 0..1, or None where the data has no labels or the first output is no class scores."""
    if not data.labelled:
        return None
    hits = count = 0
    for x, y in _batches(data, batch_size, limit):
        scores = _run(x, module)[0]
        if not is_scores(scores):
            return None
        assert y is not None
        check_labels(y.tolist(), scores.shape[1], data.name)
        hits += int((scores.argmax(1).cpu() == y).sum())
        count += len(y)
    return hits / count


def agreement(
    module: nn.Module, original: nn.Module, data: DataSet, *, batch_size: int = BATCH, limit: int | None = None
) -> float | None:
    """Share of samples in 0..1 that both networks give the same class, or None where outputs are no class scores. Of a
    resized view the original sees the full size."""
    same = count = 0
    for x, ours_all, theirs_all in _pairs(module, original, data, batch_size, limit):
        ours, theirs = ours_all[0], theirs_all[0]
        if not is_scores(theirs):
            return None
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        count += len(x)
    return same / count


def output_error(
    module: nn.Module, original: nn.Module, data: DataSet, *, batch_size: int = BATCH, limit: int | None = None
) -> float:
    """Squared error of the outputs relative to the squared size of the original's, mean over the outputs (>= 0).
    Of a resized view the original sees the full size."""
    error: list[float] = []
    size: list[float] = []
    for _, ours_all, theirs_all in _pairs(module, original, data, batch_size, limit):
        for i, (ours, theirs) in enumerate(zip(ours_all, theirs_all, strict=True)):
            if i == len(error):
                error.append(0.0)
                size.append(0.0)
            error[i] += float((ours.double() - theirs.double()).square().sum())
            size[i] += float(theirs.double().square().sum())
    return sum(e / max(s, 1e-30) for e, s in zip(error, size, strict=True)) / len(error)


def device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _batches(data: DataSet, batch_size: int, limit: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A limited look at data that may be sorted by class goes through it in a shuffled order."""
    return data.batches(batch_size, limit=limit, shuffle_seed=None if limit is None else 0)


def _pairs(
    module: nn.Module, original: nn.Module, data: DataSet, batch_size: int, limit: int | None
) -> Iterator[tuple[torch.Tensor, Outputs, Outputs]]:
    """(samples, the module's outputs, the original's)."""
    views = (data,) if data.full is data else (data, data.full)
    for batches in zip(*(_batches(view, batch_size, limit) for view in views), strict=True):
        yield batches[0][0], _run(batches[0][0], module), _run(batches[-1][0], original)


def _run(x: torch.Tensor, module: nn.Module) -> Outputs:
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            return as_outputs(module(x.to(device_of(module))))
    except RuntimeError as error:
        raise DataError(f"the network cannot take a batch of shape {tuple(x.shape)}: {error}") from error
    finally:
        module.train(training)
