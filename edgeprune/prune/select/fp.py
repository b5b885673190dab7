"""FP-OMP and FP-Backward: a filter that the kept ones of its layer can be combined to is no loss. Needs no data.

Source: Purohit et al. (TMLR 2024), sparse approximation of filters f_j by kept ones, least
``sum_j ||f_j - sum_S l_js f_s||^2``.

    FP-OMP        keep the filter with the largest ``sum_j |<R_j, f_i>|``, R_j what is left of f_j; refit; again
    FP-Backward   drop the filter whose loss raises the optimal error least, in closed form (gram.py); again
    input side    the kernel slices with which a channel's readers read it
    output side   the filters that make the channel, batch norm folded in

Shapes: everything is done on the Gram matrix (units, units) of one side. Costs are shares of its energy.
Deviations: `narrow`: filters are chosen this way, cut for real, and made up for in the readers; the low-rank execution
(1x1, KxK, 1x1), which leaves the neighbours as wide as they are, is prune/lowrank.py's. A channel goes whole, so one
side decides.
Lengths count (the public code normalises the filters). A unit of several channels is one long vector; so is a unit that
several layers make (a residual sum) or read, each with the same energy, since a combination must hold in all of them at
once. Depthwise layers on the way multiply in: the filters of both together are outer products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.graph.channels import ChannelGroup
from edgeprune.graph.network import CONV_TRANSPOSES, CONVS
from edgeprune.prune.aims import behind_norm, count_calls
from edgeprune.prune.consumers import Consumer
from edgeprune.prune.gram import Elimination, Selection, System
from edgeprune.prune.judge import Judge
from edgeprune.prune.program import Program
from edgeprune.prune.select.curve import Curve, LocalCurve, along

RIDGE = 1e-8


def fp_omp(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    return lambda group, consumers: curve_of(input_gram(consumers), pursuit)


def fp_backward(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    return lambda group, consumers: curve_of(input_gram(consumers), backward)


def fp_omp_out(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    return lambda group, consumers: curve_of(output_gram(judge.program, group), pursuit)


def fp_backward_out(judge: Judge, groups: Sequence[ChannelGroup]) -> Curve:
    return lambda group, consumers: curve_of(output_gram(judge.program, group), backward)


def curve_of(g: Tensor, choose: Callable[[Tensor], list[int]]) -> LocalCurve:
    return along(system(g), choose(g))


def output_gram(program: Program, group: ChannelGroup) -> Tensor:
    """(units, units) products of the filters that make the units; the identity where no layer does."""
    scales = _norm_scales(program)
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    between = torch.ones_like(total)
    for slot in group.slots:
        leaf: Any = program.module(slot.target) if slot.role in ("out", "channel") else None
        if not isinstance(leaf, (*CONVS, *CONV_TRANSPOSES, nn.Linear)):
            continue
        filters = _filters(leaf) * scales.get(slot.target, torch.ones(1))[:, None]
        own = _products(filters[torch.from_numpy(slot.index)])
        if slot.role == "out":
            total += own
        else:
            between *= own * group.size
    return (total if float(total.trace()) > 0 else torch.eye(group.size, dtype=torch.float64)) * between


def input_gram(consumers: Sequence[Consumer]) -> Tensor:
    """(units, units) products of the kernel slices that read the units."""
    total = torch.zeros(len(consumers[0].columns), len(consumers[0].columns), dtype=torch.float64)
    for c in consumers:
        total += _products(c.packed.double()[c.columns])
    return total


def _products(filters: Tensor) -> Tensor:
    """(units, units) inner products of (units, ...), their squared lengths adding up to 1."""
    long = filters.flatten(1)
    return long @ long.T / long.square().sum().clamp_min(1e-30)


def backward(g: Tensor) -> list[int]:
    """Units, most important first, by closed-form elimination; with more filters than dimensions the ridge tells the
    free ones apart by how short the combinations are that replace them."""
    removed, _ = Elimination([system(g)], RIDGE).order()
    return [*(set(range(len(g))) - set(removed)), *reversed(removed)]


def pursuit(g: Tensor) -> list[int]:
    """Units, most important first, by orthogonal matching pursuit."""
    return Selection([system(g)], RIDGE).order(lambda kernel: kernel.sides[0].abs().sum(1))


def system(g: Tensor) -> System:
    """Every filter as a combination of the kept ones; with all kept it is itself."""
    n = len(g)
    return System(g, torch.eye(n, dtype=torch.float64), max(float(g.trace()), 1e-30), torch.arange(n)[:, None])


def _filters(leaf: Any) -> Tensor:
    """(outputs, inputs * taps) float64."""
    weight: Tensor = leaf.weight.detach().double().cpu()
    if isinstance(leaf, CONV_TRANSPOSES):
        split = weight.reshape(leaf.groups, -1, weight.shape[1], *weight.shape[2:])
        weight = split.transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _norm_scales(program: Program) -> dict[str, Tensor]:
    """Module path of a layer -> (outputs,) scale of the batch norm right behind it."""
    calls, scales = count_calls(program), {}
    for node in program.nodes:
        if node.op == "call_module" and calls[str(node.target)] == 1:
            norm = behind_norm(program, node, calls)[1]
            if norm is not None:
                leaf = program.leaf(norm)
                scales[str(node.target)] = (
                    (leaf.weight.double() * (leaf.running_var.double() + leaf.eps).rsqrt()).detach().cpu()
                )
    return scales
