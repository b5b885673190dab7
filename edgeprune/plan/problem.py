"""What a planner is asked and what it answers: Ranking, Problem, Plan. No torch here.

Words
    group    channels that must be cut together; a *unit* of a group is the smallest set that can go on its own
    width    how many units of a group are kept
    axis     the channel count of one tensor: a sum of group widths times their multiplicities, plus a constant
    term     one fused kernel: its latency depends on at most two axes
    block    a residual branch that may be removed whole
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    length) to milliseconds, complete over all counts that the candidate widths can produce."""

    name: str
    axes: tuple[Axis, ...]
    latency_ms: Mapping[tuple[int, ...], float]
    block: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    groups: tuple[GroupChoice, ...]
    blocks: tuple[BlockChoice, ...]
    terms: tuple[Term, ...]
    budget_ms: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything. Serialised as JSON and editable by hand.

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

    def to_json(self) -> str:
        doc: dict[str, Any] = {
            "version": PLAN_VERSION,
            "widths": dict(self.widths),
            "removed": list(self.removed),
            "keep": {g: list(k) for g, k in self.keep.items()},
            "predicted_ms": self.predicted_ms,
            "damage": self.damage,
            "gap": self.gap,
        }
        return json.dumps(doc, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises UsageError when the text is not a plan."""
        try:
            doc = json.loads(text)
            if doc["version"] != PLAN_VERSION:
                raise UsageError(f"plan has version {doc['version']}, this edgeprune reads version {PLAN_VERSION}")
            return Plan(
                widths={str(g): int(w) for g, w in doc["widths"].items()},
                removed=tuple(str(b) for b in doc["removed"]),
                keep={str(g): tuple(int(u) for u in k) for g, k in doc.get("keep", {}).items()},
                predicted_ms=doc.get("predicted_ms"),
                damage=doc.get("damage"),
                gap=doc.get("gap"),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"not a plan: {error!r}; expected the plan.json that `edgeprune compress` writes"
            ) from None
