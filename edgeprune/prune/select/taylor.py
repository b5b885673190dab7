"""Taylor: squared first-order change of the network's output when a unit is set to zero.

Source: Molchanov et al. (2017).
Deviations: the output itself stands in the loss's place, E_v[(a . J^T v)^2] with random v, so no labels are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgeprune.graph.channels import ChannelGroup
from edgeprune.prune.consumers import Consumer
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program, run
from edgeprune.prune.select.curve import Curve, LocalCurve, from_scores
from edgeprune.prune.select.magnitude import magnitude_in

DRAWS = 2
IMAGES = 64


def taylor(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    """Groups that no layer reads directly go by the weights reading them."""
    scores, by_weight = changes(judge, groups), magnitude_in(judge, groups)

    def curve(group: ChannelGroup, consumers: Sequence[Consumer]) -> LocalCurve:
        return from_scores(scores[group.name]) if group.name in scores else by_weight(group, consumers)

    return curve


def changes(
    judge: Judge, groups: Sequence[ChannelGroup], draws: int = DRAWS, images: int = IMAGES
) -> dict[str, Tensor]:
    """Group name -> (units,) scores, from ``draws`` backward passes over some of the judge's images."""
    program = judge.program
    reads: dict[str, list[tuple[str, Any]]] = {}  # group -> (node that is read, slot)
    for node in program.nodes:
        for group in groups:
            for slot in group.slots:
                if node.op == "call_module" and slot.role == "in" and str(node.target) == slot.target:
                    reads.setdefault(group.name, []).append((program.sources(node)[0].name, slot))
    names = sorted({name for pairs in reads.values() for name, _ in pairs}, key=judge.order.__getitem__)
    scores = {name: torch.zeros(g.size, dtype=torch.float64) for g in groups if (name := g.name) in reads}
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for inputs in judge.fitting:
        if seen >= images:
            break
        seen += len(inputs[0])
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
            values = run(program, [leaves], [*names, program.output.name])
            out = values[program.output.name][0]
            activations = [values[n][0] for n in names]
            for _ in range(draws):
                v = [torch.randn(o.shape, generator=generator).to(o) for o in out]
                dot = torch.stack([(o * w).sum() for o, w in zip(out, v, strict=True)]).sum()
                grads = torch.autograd.grad(dot, activations, retain_graph=True, allow_unused=True)
                found = {n: (a.detach() * g).detach() for n, a, g in zip(names, activations, grads, strict=True) if g is not None}  # fmt: skip  # noqa: E501
                for group in groups:
                    if group.name in reads:
                        scores[group.name] += _change(reads[group.name], found, group, len(inputs[0]), program)
    return scores


def _change(
    pairs: Sequence[tuple[str, Any]], products: dict[str, Tensor], group: ChannelGroup, batch: int, program: Program
) -> Tensor:
    """(units,) summed over images: the square of the output's first-order change."""
    change = torch.zeros(batch, group.size, dtype=torch.float64)
    done: set[str] = set()
    for name, slot in pairs:
        if name in done or name not in products:
            continue
        done.add(name)  # several layers that read one value share its gradient
        product = products[name]
        dim = product.dim() - 1 if isinstance(program.module(slot.target), torch.nn.Linear) else 1
        flat = product.movedim(dim, 1).flatten(2).sum(2) if product.dim() > 2 else product
        change += flat.double().cpu()[:, torch.from_numpy(slot.index)].sum(2)
    return change.square().sum(0)
