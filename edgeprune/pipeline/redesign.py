"""Wide and back: other widths for the same latency, and a fresh network of these widths.

Source: Ding et al., "Approximated Oracle Filter Pruning for Destructive CNN Width Optimization" (ICML 2019), on
re-designing networks: inner layers are widened by 1.25, and pruning takes the network back to where it came from.

Deviations: back to the original's *measured latency* instead of its multiply-adds, with any method that ``compress``
has. The wide network is not trained from scratch: it begins with the original's function (graph/widen.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import UsageError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.network import Network
from edgeprune.graph.surgery import remove
from edgeprune.graph.widen import inner_groups, resize, widen
from edgeprune.pipeline.apply import apply_plan, apply_recipe
from edgeprune.pipeline.results import Compression
from edgeprune.plan.problem import Plan, Recipe
from edgeprune.train.config import History, Progress, TrainConfig
from edgeprune.train.dataset import DataSet
from edgeprune.train.finetune import finetune


def widened(network: Network, factor: float, seed: int = 0) -> Network:
    """``network`` with its inner groups wider by ``factor``; the outputs stay. Raises UsageError where there is nothing
    to widen, and UnsupportedModelError as ``widen``."""
    if not 1 < factor <= 8:
        raise UsageError(f"--factor {factor:g}: expected more than 1, and at most 8")
    inner = inner_groups(analyse(network))
    if not inner:
        raise UsageError(f"{network.origin}: no group of channels is made by one layer alone; nothing can be widened")
    return widen(network, {group.name: math.ceil(factor * group.size) for group in inner}, seed)


def train_wide(
    original: Network,
    wide: Network,
    data: DataSet,
    config: TrainConfig,
    checkpoint: Path | None,
    progress: Callable[[float, float, str], None],
) -> History:
    """Train in place: on the labels where there are any (it may become better than the original), else to give the
    original's outputs."""

    def report(step: Progress) -> None:
        progress(step.step, step.steps, "training the wide network")

    teacher = None if data.labelled else original.copy().module
    return finetune(wide.module, teacher, data, config, checkpoint, report)


def plan_for(original: Network, wide: Network, recipe: Recipe) -> Plan:
    """The plan that makes of the original's form the form that ``recipe`` made of the wide network."""
    widths = {group.name: group.size for group in analyse(wide).groups}
    for step in recipe.steps:
        widths |= step.widths
    sizes = {group.name: group.size for group in analyse(original).groups}
    return Plan({n: w for n, w in widths.items() if n in sizes and w != sizes[n]}, removed=recipe.removed)


def fresh(network: Network, recipe: Recipe, seed: int = 0) -> Network:
    """A network of the recipe's form, with new random weights. Raises UsageError when the recipe is for another one."""
    new = apply_recipe(network, replace(recipe, steps=()))
    for plan in recipe.steps:
        new = apply_plan(new, plan) if plan.keep else _resized(new, plan, seed)
    new = new.copy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in new.module.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    return new


def _resized(network: Network, plan: Plan, seed: int) -> Network:
    """As ``apply_plan``, for a plan that says how many channels there are, and not which."""
    blocks = {block.name: block for block in find_blocks(network)}
    unknown = sorted(set(plan.removed) - set(blocks))
    if unknown:
        raise UsageError(f"the plan removes {unknown[0]}, which {network.origin} does not have")
    return remove(resize(network, plan.widths, seed), [blocks[name] for name in plan.removed])


@dataclass(frozen=True, slots=True)
class Redesign:
    """compression: of the wide network, back to the original's latency. plan: the widths, relative to the original's
    form. share: of the wide network's latency that the original takes; wide_accuracy: before it was pruned."""

    compression: Compression
    plan: Plan
    factor: float
    share: float
    accuracy: float | None
    wide_accuracy: float | None

    @property
    def network(self) -> Network:
        return self.compression.network

    def recipe(self) -> Recipe:
        """What ``redesign.json`` holds: one plan for the original's form."""
        return Recipe((replace(self.plan, keep={}),))

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.compression.to_dict(),
            "factor": self.factor,
            "original_share": self.share,
            "original_accuracy": self.accuracy,
            "wide_accuracy": self.wide_accuracy,
            "redesign": dict(self.plan.widths),
        }

    def text(self) -> str:
        lines = [self.compression.text()]
        shown = [f"{name} {a:.2%}" for name, a in (("original", self.accuracy), ("wide", self.wide_accuracy)) if a]
        lines.append(
            f"'before' is the network {self.factor:g} times as wide inside; the budget is the original's latency, "
            f"{self.share:.1%} of it" + (f"; accuracy: {', '.join(shown)}" if shown else "")
        )
        lines.append("redesign.json: the widths as a plan for the original's form; `edgeprune rebuild MODEL` makes one")
        return "\n".join(lines)
