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
        (scores,) = _run(x, module)[0][:1]
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
    """Share of samples in 0..1 that both networks give the same class, or None where outputs are no class scores."""
    same = count = 0
    for x, _ in _batches(data, batch_size, limit):
        ours, theirs = (outputs[0] for outputs in _run(x, module, original))
        if not is_scores(theirs):
            return None
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        count += len(x)
    return same / count


def output_error(
    module: nn.Module, original: nn.Module, data: DataSet, *, batch_size: int = BATCH, limit: int | None = None
) -> float:
    """Squared error of the outputs relative to the squared size of the original's, mean over the outputs (>= 0)."""
    error: list[float] = []
    size: list[float] = []
    for x, _ in _batches(data, batch_size, limit):
        for i, (ours, theirs) in enumerate(zip(*_run(x, module, original), strict=True)):
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


def _run(x: torch.Tensor, *modules: nn.Module) -> list[Outputs]:
    results = []
    for module in modules:
        training = module.training
        module.eval()
        try:
            with torch.inference_mode():
                results.append(as_outputs(module(x.to(device_of(module)))))
        except RuntimeError as error:
            raise DataError(f"the network cannot take a batch of shape {tuple(x.shape)}: {error}") from error
        finally:
            module.train(training)
    return results
