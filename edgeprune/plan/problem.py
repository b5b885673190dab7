"""What a planner is asked and what it answers: Ranking, Problem, Trials, Plan, Recipe. No torch here.

Words
    group    channels that must be cut together; a *unit* of a group is the smallest set that can go on its own
    width    how many units of a group are kept
    axis     the channel count of one tensor: a sum of group widths times their multiplicities, plus a constant
    term     one fused kernel: its latency depends on at most two axes
    block    a residual branch that may be removed whole
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgeprune.errors import UsageError

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class Ranking:
    """Removal order and cost of one group, the common currency of all selection methods.

    order:  (size,) unit indices, most important first; width ``w`` keeps ``order[:w]``
    damage: (size + 1,) ``damage[w]`` is the expected relative squared error of the network's output when only ``w``
            units are kept (dimensionless, comparable across groups, ``damage[size] == 0``, non-increasing in ``w``)
    """

    order: np.ndarray
    damage: np.ndarray

    def keep(self, width: int) -> tuple[int, ...]:
        """The kept units, sorted."""
        return tuple(sorted(int(u) for u in self.order[:width]))

    @staticmethod
    def free(size: int) -> Ranking:
        """A ranking that says nothing: any cut costs nothing. For asking how fast a network could become at all."""
        return Ranking(np.arange(size), np.zeros(size + 1))


@dataclass(frozen=True, slots=True)
class Axis:
    """Channel count of a tensor: ``const + sum(multiplicity * width[group])``; groups by their index."""

    terms: tuple[tuple[int, int], ...]
    const: int = 0

    def at(self, widths: Mapping[int, int]) -> int:
        return self.const + sum(m * widths[g] for g, m in self.terms)


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """A group the planner decides: its candidate widths (ascending, the last is the full size), their damage, and the
    block it lies in (it costs and hurts nothing once that block is removed)."""

    name: str
    widths: tuple[int, ...]
    damage: tuple[float, ...]
    block: int | None = None


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """A removable block and what removing it costs, in the unit of ``Ranking.damage``."""

    name: str
    damage: float


@dataclass(frozen=True, slots=True)
class Term:
    """One kernel. ``axes`` holds 0, 1 or 2 axes; ``latency_ms`` maps their channel counts (a tuple of the same
    length) to milliseconds, complete over all counts that the candidate widths can produce. ``macs``: the same counts
    to multiply-adds, where they are known."""

    name: str
    axes: tuple[Axis, ...]
    latency_ms: Mapping[tuple[int, ...], float]
    block: int | None = None
    macs: Mapping[tuple[int, ...], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    groups: tuple[GroupChoice, ...]
    blocks: tuple[BlockChoice, ...]
    terms: tuple[Term, ...]
    budget_ms: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything, for one network.

    widths:  group name -> units kept (groups not named keep everything)
    keep:    group name -> the kept unit indices, sorted; empty until channels were chosen
    removed: names of the removed blocks
    """

    widths: Mapping[str, int]
    removed: tuple[str, ...] = ()
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    predicted_ms: float | None = None
    damage: float | None = None
    gap: float | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """One step down: the group ``name`` to ``width`` units, or, with width None, the block ``name`` taken out."""

    name: str
    width: int | None = None


class Trials(Protocol):
    """Moves tried on the network itself, each on top of all that were accepted so far, on calibration data only.

    The channels of a width are those of the group's ranking, and the layers that read it get their best weights.
    """

    def layer_error(self, move: Move) -> float:
        """How far the outputs of the layers that read what the move changes are from the original's: the Frobenius norm
        of the difference over that of the original's values, summed over these layers."""

    def output_error(self, move: Move) -> float:
        """How much the error of the network's final output grows with the move; negative where the move helps."""

    def accept(self, *moves: Move) -> None:
        """Take moves for good: later ones are tried on top of them."""

    def restart(self) -> None:
        """Forget what was accepted."""


Plans = Callable[[float], Plan]  # budget in ms -> the plan within it; raises BudgetUnreachableError
Planner = Callable[[Problem, Trials | None], Plans]  # the problem's own budget_ms means nothing to it


@dataclass(frozen=True, slots=True)
class Factoring:
    """A convolution made of thinner ones (graph/factor.py).

    layer:   its module path
    inputs:  the input slices that stay, behind a 1x1 convolution; None: that side is as it was
    outputs: the filters that stay, before a 1x1 convolution; None likewise
    """

    layer: str
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Plans in the order they are applied, each made for the network that the one before it leaves; before them the
    input's height and width are set to ``resolution``, if there is one, and layers are ``factored``.

    One plan would not do: a cut can leave finer groups than it found (a grouped convolution with one channel left in
    each group is a depthwise one), and the next plan may use them.
    """

    steps: tuple[Plan, ...]
    resolution: tuple[int, int] | None = None
    factored: tuple[Factoring, ...] = ()

    @property
    def removed(self) -> tuple[str, ...]:
        return tuple(name for plan in self.steps for name in plan.removed)

    def to_json(self) -> str:
        steps = [
            {
                "widths": dict(plan.widths),
                "removed": list(plan.removed),
                "keep": {g: list(k) for g, k in plan.keep.items()},
                "predicted_ms": plan.predicted_ms,
                "damage": plan.damage,
                "gap": plan.gap,
            }
            for plan in self.steps
        ]
        before: dict[str, Any] = {} if self.resolution is None else {"resolution": list(self.resolution)}
        if self.factored:
            before["factored"] = [{"layer": f.layer, "inputs": f.inputs, "outputs": f.outputs} for f in self.factored]
        return json.dumps({"version": PLAN_VERSION, **before, "steps": steps}, indent=1)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Raises UsageError when the text is no recipe."""
        try:
            doc = json.loads(text)
            if doc["version"] != PLAN_VERSION:
                raise UsageError(f"plan has version {doc['version']}, this edgeprune reads version {PLAN_VERSION}")
            height, width = doc.get("resolution", (0, 0))
            size = (int(height), int(width)) if "resolution" in doc else None
            factored = tuple(_factoring(f) for f in doc.get("factored", ()))
            return Recipe(tuple(_plan(step) for step in doc["steps"]), size, factored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"not a plan: {error!r}; expected the plan.json that `edgeprune compress` writes"
            ) from None


def _factoring(found: dict[str, Any]) -> Factoring:
    inputs, outputs = (None if found[k] is None else tuple(int(u) for u in found[k]) for k in ("inputs", "outputs"))
    return Factoring(str(found["layer"]), inputs, outputs)


def _plan(step: dict[str, Any]) -> Plan:
    keep = {str(g): tuple(int(u) for u in k) for g, k in step.get("keep", {}).items()}
    widths = {str(g): int(w) for g, w in step["widths"].items()}
    wrong = [g for g, k in keep.items() if widths.get(g, len(k)) != len(k)]
    if wrong:
        raise UsageError(f"plan: group {wrong[0]} has width {widths[wrong[0]]} but keeps {len(keep[wrong[0]])} units")
    return Plan(
        widths=widths,
        removed=tuple(str(b) for b in step["removed"]),
        keep=keep,
        predicted_ms=step.get("predicted_ms"),
        damage=step.get("damage"),
        gap=step.get("gap"),
    )
