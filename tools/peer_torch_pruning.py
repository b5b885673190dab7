"""Torch-Pruning 1.6.1 at a measured latency: the peer that tools/bench_methods runs beside edgeprune's own methods.

Torch-Pruning takes a share of channels, not a latency; the share whose *measured* latency fits is found by bisection.
It is given what helps it: group importances over the whole network, widths rounded as asked, its batch norms estimated
again on the calibration images (it has no repair of its own). Where it cannot take a network whole, the convolutions
behind which residual branches join are excluded, and the answer says so.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

import edgeprune
from edgeprune.train.dataset import DataSet

STEPS = 9


@dataclass(frozen=True)
class Pruned:
    """module: cut, not trained. share: of the channels, as asked of it. ratio: measured latency / the original's."""

    module: nn.Module
    share: float
    ratio: float
    note: str


def to_latency(
    model: nn.Module, shape: tuple[int, ...], budget: float, data: DataSet, importance: str, round_to: int
) -> Pruned | None:
    """The widest network within ``budget`` (a share of the original's measured latency); None if there is none.

    importance: "magnitude" or "taylor" (the gradients are those of the cross entropy with the network's own answers,
    since the images have no labels)
    """
    images = torch.cat([x for x, _ in data.batches(64)])
    note, excluded = "", _classifiers(model)
    try:
        _prune(model, shape, 0.3, images, importance, round_to, excluded)
    except Exception as error:
        note = f"residual convolutions excluded: {type(error).__name__} otherwise"
        excluded = excluded + _residual(model)
    low, high, best = 0.0, 0.95, None
    for _ in range(STEPS):
        share = (low + high) / 2
        module = _prune(model, shape, share, images, importance, round_to, excluded)
        ratio = edgeprune.measure(model, module, input_shape=shape, rounds=20).ratio("model 2")[0]
        if ratio <= budget:
            high, best = share, Pruned(module, share, ratio, note)
        else:
            low = share
    if best is not None:
        _estimate_norms(best.module, images)
    return best


def _prune(
    model: nn.Module,
    shape: tuple[int, ...],
    share: float,
    images: torch.Tensor,
    importance: str,
    round_to: int,
    excluded: list[nn.Module],
) -> nn.Module:
    import torch_pruning as tp

    new = copy.deepcopy(model)
    place = {id(old): fresh for old, fresh in zip(model.modules(), new.modules(), strict=True)}
    taylor = importance == "taylor"
    pruner = tp.pruner.BasePruner(
        new,
        torch.zeros(shape),
        importance=tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=share,
        max_pruning_ratio=0.95,
        round_to=round_to,
        ignored_layers=[place[id(m)] for m in excluded],
    )
    if taylor:
        for x in images.split(64):
            answers = new(x)
            nn.functional.cross_entropy(answers, answers.argmax(1)).backward()
    pruner.step()
    new.zero_grad(set_to_none=True)
    with torch.no_grad():
        new(torch.zeros(2, *shape[1:]))  # a network that it broke is found here
    return new.eval()


def _classifiers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def _residual(model: nn.Module) -> list[nn.Module]:
    """The convolutions of a residual network of basic blocks that write what a shortcut is added to."""
    named = dict(model.named_modules())
    return [m for n, m in named.items() if isinstance(m, nn.Conv2d) and (n.endswith("conv2") or "." not in n)]


def _estimate_norms(module: nn.Module, images: torch.Tensor) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for x in images.split(64):
            module(x)
    module.eval()
    for norm in norms:
        norm.momentum = 0.1
