"""Torch-Pruning 1.6.1 at a measured latency: the peer that tools/bench_methods runs beside edgeprune's own methods.

Torch-Pruning takes a share of channels, not a latency; shares whose *measured* latency fits are looked for. It is
given what helps it: group importances over the whole network, several roundings of its widths, and, where asked,
batch norms estimated again on the calibration images (it has no repair of its own). Where it cannot take a network
whole, the convolutions behind which residual branches join are excluded, and the answer says so.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import nn

import edgeprune
from edgeprune.train.dataset import DataSet

GRID = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
STEPS = 4


@dataclass(frozen=True)
class Pruned:
    """module: cut, not trained. share: of the channels, as asked of it. ratio: measured latency / the original's."""

    module: nn.Module
    share: float
    ratio: float
    note: str


def to_latency(
    model: nn.Module,
    shape: tuple[int, ...],
    budget: float,
    data: DataSet,
    importance: str,
    rounding: tuple[int, ...],
    norms: bool,
) -> Pruned | None:
    """A network within ``budget`` (a share of the original's measured latency); None if there is none. Of all that were
    tried and lie within it: the one that decides most often as the original does, on the calibration images.

    importance: "magnitude" or "taylor" (the gradients are those of the cross entropy with the network's own answers,
    since the images have no labels)
    rounding: what widths are rounded to, each is tried
    norms: whether batch norms are estimated again on the images, which it does not do itself
    """
    images = torch.cat([x for x, _ in data.batches(64)])
    best: tuple[float, Pruned] | None = None
    for round_to in rounding:
        for found in _within(model, shape, budget, images, importance, round_to):
            if norms:
                _estimate_norms(found.module, images)
            same = _agreement(found.module, model, images)
            if best is None or same > best[0]:
                best = (same, found)
    return None if best is None else best[1]


def _within(
    model: nn.Module, shape: tuple[int, ...], budget: float, images: torch.Tensor, importance: str, round_to: int
) -> list[Pruned]:
    """Networks within the budget, of a grid of shares and of bisections towards where the grid crosses the budget. More
    than one, since a larger share is not always faster: layers that would vanish are left whole."""
    note, excluded = f"widths rounded to {round_to}", _classifiers(model)
    try:
        _prune(model, shape, 0.3, images, importance, round_to, excluded)
    except Exception as error:
        note += f"; residual convolutions excluded: {type(error).__name__} otherwise"
        excluded = excluded + _residual(model)

    def tried(share: float) -> Pruned | None:
        try:
            module = _prune(model, shape, share, images, importance, round_to, excluded)
        except Exception:
            return None  # it breaks the network at this share
        ratio = edgeprune.measure(model, module, input_shape=shape, rounds=20).ratio("model 2")[0]
        return Pruned(module, share, ratio, note)

    grid = [p for p in map(tried, GRID) if p is not None]
    found = [p for p in grid if p.ratio <= budget]
    ends = [(0.0, 1.0), *((p.share, p.ratio) for p in grid)]  # nothing cut, nothing saved
    for (low, slower), (high, faster) in itertools.pairwise(ends):
        if slower > budget >= faster:
            for _ in range(STEPS):
                share = (low + high) / 2
                middle = tried(share)
                if middle is not None and middle.ratio <= budget:
                    found.append(middle)
                    high = share
                else:
                    low = share
    return found


def _agreement(module: nn.Module, model: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        answers = [torch.cat([net(x).argmax(1) for x in images.split(64)]) for net in (module, model.eval())]
    return (answers[0] == answers[1]).double().mean().item()


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
