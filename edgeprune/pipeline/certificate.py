"""The certificate of a run: its cuts, applied to the original's own weights, equal the original with those channels
masked to zero. It proves the surgery of this very run, apart from any refitting or training of weights."""

from __future__ import annotations

import torch

from edgeprune.errors import VerificationError
from edgeprune.graph.blocks import find_blocks
from edgeprune.graph.channels import analyse
from edgeprune.graph.masking import masked_outputs
from edgeprune.graph.network import Network
from edgeprune.graph.surgery import cut, remove
from edgeprune.plan.problem import Recipe

TOLERANCE = 1e-4


def certify(original: Network, recipe: Recipe, batch: int = 2) -> float:
    """Largest error of any output in any step of the recipe, relative to the largest masked output (dimensionless).

    Raises VerificationError above 1e-4.
    """
    network, worst = original, 0.0
    inputs = original.random_inputs(batch)
    for number, plan in enumerate(recipe.steps, 1):
        channels = analyse(network)
        narrowed = cut(network, channels, dict(plan.keep))
        with torch.no_grad():
            expected = masked_outputs(network, channels, dict(plan.keep), inputs)
            actual = narrowed.module(*inputs)
        actual = actual if isinstance(actual, (tuple, list)) else (actual,)
        for ours, theirs in zip(actual, expected, strict=True):
            scale = max(float(theirs.double().abs().max()), 1e-30)
            error = float((ours.double() - theirs.double()).abs().max()) / scale
            worst = error if not error <= worst else worst  # a NaN stays
        if not worst <= TOLERANCE:
            raise VerificationError(
                f"step {number} of the plan: the cut network differs from the masked original by {worst:.3g} of its "
                f"largest output; expected at most {TOLERANCE:g}. Please report this network: {original.origin}"
            )
        network = remove(narrowed, [b for b in find_blocks(narrowed) if b.name in plan.removed])
    return worst
