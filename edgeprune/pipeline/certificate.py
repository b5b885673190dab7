"""The certificate of a run: its cuts, applied to the original's own weights, equal the original with those channels
masked to zero. It proves the surgery of this very run, apart from any refitting or training of weights.

A method that learns what can go may cut another network than the original: one with more in it that can go, of the same
outputs, which is shown too. Its cuts are applied to the weights that it had before training. A shortcut that carried
nothing there carries its input here, since behind a removed layer zeros would be compared with zeros.

Factored layers are shown to be the kernels that they come to, multiplied out; cuts are then those of the network that
has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from edgeprune.errors import VerificationError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.factor import merged
from edgeprune.graph.masking import masked_outputs
from edgeprune.graph.network import Network
from edgeprune.graph.resconv import with_open_shortcuts
from edgeprune.graph.surgery import cut, remove
from edgeprune.plan.problem import Factoring, Recipe

TOLERANCE = 1e-4


def certify(original: Network, recipe: Recipe, batch: int = 2) -> float:
    """Largest error of any output in any step of the recipe, relative to the largest masked output (dimensionless).

    Raises VerificationError above 1e-4.
    """
    network, worst = with_open_shortcuts(original), 0.0
    inputs = original.random_inputs(batch)
    for number, plan in enumerate(recipe.steps, 1):
        channels = analyse(network)
        narrowed = cut(network, channels, dict(plan.keep))
        with torch.no_grad():
            expected = masked_outputs(network, channels, dict(plan.keep), inputs)
            actual = narrowed.module(*inputs)
        actual = actual if isinstance(actual, (tuple, list)) else (actual,)
        for ours, theirs in zip(actual, expected, strict=True):
            error = _error(ours, theirs)
            worst = error if not error <= worst else worst  # a NaN stays
        if not worst <= TOLERANCE:
            raise VerificationError(
                f"step {number} of the plan: the cut network differs from the masked original by {worst:.3g} of its "
                f"largest output; expected at most {TOLERANCE:g}. Please report this network: {original.origin}"
            )
        network = remove(narrowed, [b for b in find_blocks(narrowed) if b.name in plan.removed])
    return worst


def certify_same(original: Network, start: Network, batch: int = 2) -> float:
    """Largest difference of any output between the original and what a method made of it before it learnt, relative to
    the largest output. Raises VerificationError above 1e-4."""
    inputs = original.random_inputs(batch)
    with torch.no_grad():
        expected, actual = original.module.eval()(*inputs), start.module.eval()(*inputs)
    worst = max(_error(ours, theirs) for ours, theirs in _pairs(actual, expected))
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"preparing {original.origin} for learning changed its outputs by {worst:.3g} of the largest; expected at "
            f"most {TOLERANCE:g}. Please report this network, and use another --method meanwhile"
        )
    return worst


def certify_factored(original: Network, start: Network, factorings: Sequence[Factoring], batch: int = 2) -> float:
    """Largest difference of any output between a network of factored layers and the original with the one kernel that
    each of them comes to, relative to the largest output. Raises VerificationError above 1e-4."""
    whole = merged(start, original, factorings)
    inputs = original.random_inputs(batch)
    with torch.no_grad():
        expected, actual = whole.module.eval()(*inputs), start.module.eval()(*inputs)
    worst = max(_error(ours, theirs) for ours, theirs in _pairs(actual, expected))
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"factoring layers of {original.origin} gave other outputs than their kernels multiplied out, by "
            f"{worst:.3g} of the largest; expected at most {TOLERANCE:g}. Please report this network, and leave "
            "--lowrank out"
        )
    return worst


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(*(v if isinstance(v, (tuple, list)) else (v,) for v in (actual, expected)), strict=True)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    scale = max(float(theirs.double().abs().max()), 1e-30)
    return float((ours.double() - theirs.double()).abs().max()) / scale
