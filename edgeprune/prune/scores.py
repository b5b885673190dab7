"""Which channels matter: per group an order of its units and a local curve of what dropping them costs.

    magnitude   norm of the unit's own filters times the norm of what its readers do with it; needs no data
    taylor      squared first-order change of the network's output when the unit is set to zero, E_v[(a . J^T v)^2] with
                random v, so no labels are needed (Molchanov et al., 2017, with the output itself in the loss's place)
    cap         residual of the readers' outputs after their best weights for what is left (Xie et al., 2021): the
                elimination kernel of gram.py on unlabelled inputs

The curves are only comparable within a group; sensitivity.py measures them in the network's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.graph.channels import ChannelGroup
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES
from edgeprune.prune.consumers import Consumer, eliminate
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program, run


@dataclass(frozen=True, slots=True)
class LocalCurve:
    """order: (size,) most important first. cost: (size + 1,) of keeping ``order[:w]``; cost[size] == 0, non-increasing;
    its unit is the method's own."""

    order: np.ndarray
    cost: np.ndarray


def from_scores(scores: Tensor) -> LocalCurve:
    """Units by descending score; dropping several costs the sum of their scores."""
    values = scores.detach().double().cpu().numpy()
    order = np.argsort(-values, kind="stable")
    cost = np.concatenate([np.cumsum(values[order][::-1])[::-1], [0.0]])
    return LocalCurve(order, cost)


def from_removals(size: int, removed: Sequence[int], damage: Sequence[float]) -> LocalCurve:
    """From the kernel's removal order; keeping nothing costs as much again as keeping one."""
    last = next(u for u in range(size) if u not in set(removed))
    order = np.array([last, *reversed(list(removed))])
    grown = np.maximum.accumulate(np.asarray([0.0, *damage]))
    cost = np.concatenate([[2 * grown[-1]], grown[::-1]])
    return LocalCurve(order, cost)


def _leaf(program: Program, path: str) -> Any:
    return program.modules[path] if path in program.modules else program.network.module.get_submodule(path)


def magnitude(program: Program, group: ChannelGroup) -> LocalCurve:
    """Squared norm of a unit's filters (batch norm's scale included) times squared norm of the weights that read it."""
    own = torch.zeros(group.size, dtype=torch.float64)
    read = torch.zeros(group.size, dtype=torch.float64)
    scale = torch.ones(group.size, dtype=torch.float64)
    for slot in group.slots:
        index = torch.from_numpy(slot.index)
        if slot.role == "param":
            continue
        leaf: Any = _leaf(program, slot.target)
        if isinstance(leaf, BATCH_NORMS) and leaf.running_var is not None:
            gain = leaf.weight.detach().double().square() / (leaf.running_var.double() + leaf.eps)
            scale = scale * gain[index].mean(1).cpu()
            continue
        transposed = isinstance(leaf, CONV_TRANSPOSES)
        weight: Tensor = leaf.weight.detach().double()
        if transposed:
            weight = weight.transpose(0, 1)
        if slot.role == "in" and getattr(leaf, "groups", 1) == 1:
            read += weight.transpose(0, 1).flatten(1).square().sum(1).cpu()[index].sum(1)
        elif slot.role == "out" and getattr(leaf, "groups", 1) == 1:
            own += weight.flatten(1).square().sum(1).cpu()[index].sum(1)
        elif slot.role == "channel" and not transposed:
            scale = scale * weight.flatten(1).square().sum(1).cpu()[index].sum(1)
    own, read = (torch.ones_like(v) if float(v.sum()) == 0 else v for v in (own, read))
    return from_scores(own * scale * read)


def cap(consumers: Sequence[Consumer]) -> LocalCurve:
    removed, damage, _ = eliminate(consumers)
    return from_removals(len(consumers[0].columns), removed, damage)


def taylor(judge: Judge, groups: Sequence[ChannelGroup], draws: int = 2, images: int = 64) -> dict[str, LocalCurve]:
    """First-order curves of all groups from ``draws`` backward passes over some of the judge's images."""
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
    return {name: from_scores(s) for name, s in scores.items()}


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
        leaf: Any = program.network.module.get_submodule(slot.target)
        dim = product.dim() - 1 if isinstance(leaf, torch.nn.Linear) else 1
        flat = product.movedim(dim, 1).flatten(2).sum(2) if product.dim() > 2 else product
        change += flat.double().cpu()[:, torch.from_numpy(slot.index)].sum(2)
    return change.square().sum(0)
