"""Applying plans: one after another while shrinking, or a finished recipe to a fresh copy of the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgeprune.errors import UsageError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.factor import factored
from edgeprune.graph.network import Network
from edgeprune.graph.resolution import at_resolution
from edgeprune.graph.surgery import cut, remove
from edgeprune.plan.problem import Plan, Ranking, Recipe


@dataclass(frozen=True, slots=True)
class State:
    """A network on its way, and the plans that brought it there."""

    network: Network
    recipe: Recipe = field(default_factory=lambda: Recipe(()))


def advance(state: State, plan: Plan, rankings: Mapping[str, Ranking]) -> State:
    """Cut and remove what the plan says, the channels chosen by the rankings; ``state.network`` stays as it was."""
    sizes = {g.name: g.size for g in analyse(state.network).groups}
    keep = {
        name: rankings[name].keep(width)
        for name, width in plan.widths.items()
        if name in rankings and width < sizes[name]
    }
    chosen = replace(plan, widths={name: len(units) for name, units in keep.items()}, keep=keep)
    return State(apply_plan(state.network, chosen), Recipe((*state.recipe.steps, chosen)))


def apply_plan(network: Network, plan: Plan) -> Network:
    """A new network: ``plan.keep`` cut and ``plan.removed`` taken out of a copy of ``network``.

    Raises UsageError when the plan names a group or block that the network does not have.
    """
    channels, blocks = analyse(network), {b.name: b for b in find_blocks(network)}
    names = {g.name for g in channels.groups}
    unknown = [name for name in plan.keep if name not in names] + [name for name in plan.removed if name not in blocks]
    if unknown:
        raise UsageError(
            f"the plan names {', '.join(unknown[:5])}, which {network.origin} does not have; it was made for another "
            "network: `edgeprune inspect` lists this one's groups and blocks"
        )
    return remove(cut(network, channels, dict(plan.keep)), [blocks[name] for name in plan.removed])


def apply_recipe(network: Network, recipe: Recipe) -> Network:
    """Apply all plans of a recipe, in order, to the network it was made for, at the recipe's resolution and with its
    layers factored. Raises UsageError as ``apply_plan`` and ``factored``, UnsupportedModelError as
    ``at_resolution``."""
    if recipe.resolution is not None:
        network = at_resolution(network, recipe.resolution)
    if recipe.factored:
        network = factored(network, recipe.factored)
    for plan in recipe.steps:
        network = apply_plan(network, plan)
    return network
