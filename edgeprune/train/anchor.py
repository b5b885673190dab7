"""Batch norms made ready for training on a network whose weights were refitted.

In training a batch norm takes the statistics of the batch, in evaluation its running ones. After cutting or refitting
the two disagree, and the first training step would start from another function than the one that was refitted.
Anchoring puts the true statistics into the batch norm and undoes that in its scale and shift:

    scale' = scale * sqrt((var' + eps) / (var + eps)),   shift' = shift + scale * (mean' - mean) / sqrt(var + eps)

so evaluation computes what it did, and training on batches like these computes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from edgeprune.graph.network import BATCH_NORMS


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, BATCH_NORMS) and m.affine and m.running_mean is not None]


@torch.no_grad()
def anchor(module: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """Anchor all batch norms in place; the module's function in evaluation mode stays what it is.

    batches: inputs (N, C, ...) like those of training. A batch norm that is called several times gets the statistics
    over all its calls.
    """
    sums: dict[nn.Module, list[torch.Tensor]] = {}

    def record(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)  # (C, samples and pixels)
        parts = [torch.tensor(float(x.shape[1])), x.sum(1), x.square().sum(1)]
        if norm in sums:
            parts = [a + b for a, b in zip(sums[norm], parts, strict=True)]
        sums[norm] = parts

    training = module.training
    module.eval()
    handles = [norm.register_forward_pre_hook(record) for norm in norms(module)]
    try:
        for x in batches:
            module(x)
    finally:
        for handle in handles:
            handle.remove()
        module.train(training)
    for norm, (count, total, squares) in sums.items():
        mean = total / count.to(total.device)
        var = (squares / count.to(total.device) - mean.square()).clamp_min(0)
        _rescale(norm, mean, var)


def _rescale(norm: nn.Module, mean: torch.Tensor, var: torch.Tensor) -> None:
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    old = (norm.running_var.double() + norm.eps).sqrt()
    scale = norm.weight.double()
    norm.bias.copy_(norm.bias.double() + scale * (mean - norm.running_mean.double()) / old)
    norm.weight.copy_(scale * (var + norm.eps).sqrt() / old)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


@torch.no_grad()
def anchor_if_better(
    module: nn.Module, batches: Sequence[torch.Tensor], losses: Sequence[Callable[[object], float]]
) -> None:
    """Anchor where the module is better with its running statistics than with a batch's own: it was refitted. Where it
    is not, the batch's own are the repair. losses: of what the module returns, one for each batch."""
    running = batch = 0.0
    for x, loss in zip(batches, losses, strict=True):
        trial = copy.deepcopy(module).eval()
        running += loss(trial(x))
        for norm in norms(trial):
            norm.train()
        batch += loss(trial(x))
    if running < batch:
        anchor(module, batches)
