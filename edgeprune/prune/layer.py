"""Least squares for one layer and the batch norm behind it.

The ridge draws towards the present weights. Its strength, "leave it alone" included, is chosen on calibration images
that the fit has not seen, then all are used.

Behind a relu only positive values matter: where the aim is negative, every negative value is as good. So the convex
loss ``(y - z)^2 where z > 0, max(y, 0)^2 elsewhere`` is minimised, y what the layer gives and z its aim, by a few steps
that each replace the hidden part of the aim by what is there already (a majorisation: the loss never grows). They share
one factorisation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.prune.gram import RIDGES, gram, ridge_solver, ridge_step
from edgeprune.prune.patches import pack, unpack

HELD_OUT = 4  # every fourth image judges the ridge
RELU_STEPS = 3
QUICK_RIDGE = 1e-3
AMPLE = 8  # rows per column


@dataclass(frozen=True, slots=True)
class Task:
    """What a layer reads and what is wanted, at n sampled positions.

    rows:      as of patches.rows_at, (n, p), or (groups, n, p)
    target:    (n, outputs) the value wanted, of the layer and its batch norm plus ``other``
    other:     (n, outputs) what is added to the layer's value, or None
    image:     (n,) the image each position lies in
    rectified: whether a relu is all that reads the sum
    quick:     take a middling ridge and plain least squares where there are ample rows: for trials, many of them
    """

    rows: Tensor
    target: Tensor
    other: Tensor | None
    image: Tensor
    rectified: bool
    quick: bool = False


def refit_layer(leaf: Any, norm: Any, task: Task) -> tuple[nn.Module, nn.Module | None] | None:
    """New copies of a layer and of the batch norm behind it (or None), so that together they meet the task as nearly as
    they can; None if that gains nothing on held-out images."""
    scale, shift = _affine(norm, leaf)
    packed, rows = pack(leaf), task.rows
    groups = packed.shape[0] if packed.dim() == 3 else 1
    if packed.dim() == 2:
        packed, rows = packed[None], rows[None]
    packed = packed * scale.reshape(groups, 1, -1)
    packed[:, -1] += shift.reshape(groups, -1)
    gained = False
    for g, own in enumerate(task.target.tensor_split(groups, 1)):
        start = rows[g] @ packed[g]
        if task.other is not None:
            start = start + task.other.tensor_split(groups, 1)[g]
        if task.quick and len(task.image) >= AMPLE * rows.shape[-1]:
            step: Tensor | None = ridge_step(rows[g], own - start, QUICK_RIDGE)
        else:
            step = choose_step(rows[g], own - start, task.image, start if task.rectified else None)
        if step is not None:
            packed[g] += step
            gained = True
    if not gained:
        return None
    raw = torch.bmm(rows, packed).transpose(0, 1).flatten(1)
    weight, bias = unpack(leaf, packed if groups > 1 else packed[0])
    new = copy.deepcopy(leaf)
    if norm is None:
        new.weight.data.copy_(weight)
        new.bias = nn.Parameter(bias, requires_grad=leaf.weight.requires_grad)
        return new, None
    safe = _safe(scale)
    new.weight.data.copy_(weight / safe.reshape(-1, *[1] * (weight.dim() - 1)))
    own = new.bias.detach() if new.bias is not None else torch.zeros_like(bias)
    plain = (raw - bias) / safe + own  # what the layer gives without its batch norm
    fresh = copy.deepcopy(norm)
    mean, var = plain.double().mean(0), plain.double().var(0, unbiased=False)
    fresh.running_mean.copy_(mean)
    fresh.running_var.copy_(var)
    fresh.weight.data.copy_(safe.double() * torch.sqrt(var + norm.eps))
    fresh.bias.data.copy_(bias.double() + safe.double() * (mean - own.double()))
    return new, fresh


def _affine(norm: Any, leaf: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) of the batch norm, for the packed weight with its bias row scaled too."""
    if norm is None:
        ones = torch.ones(leaf.weight.shape[0], device=leaf.weight.device)
        return ones, torch.zeros_like(ones)
    scale = norm.weight.detach().double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale.float(), (norm.bias.detach().double() - norm.running_mean.double() * scale).float()


def _safe(scale: Tensor) -> Tensor:
    """Scales kept away from zero: they are divided by."""
    floor = 1e-3 * float(scale.abs().median().clamp_min(1e-6))
    return torch.where(scale.abs() < floor, torch.full_like(scale, floor), scale)


def choose_step(rows: Tensor, residual: Tensor, image: Tensor, start: Tensor | None = None) -> Tensor | None:
    """The ridge step (p, outputs) with the strength that serves held-out images best; None if none beats leaving it
    alone. start: what the layer gives now, if a relu follows (see the module's docstring)."""
    held = image % HELD_OUT == HELD_OUT - 1
    if not bool(held.any()) or bool(held.all()):
        return ridge_step(rows, residual, RIDGES[2])
    if float(residual.double().square().sum()) <= 1e-10 * len(rows):
        return None
    a, b = rows[~held], residual[~held]
    c, d = rows[held], residual[held]
    base = float(d.double().square().sum())
    best, strength = base * (1 - 1e-4), None
    if len(a) < a.shape[1]:
        for ridge in RIDGES[2:]:
            error = float((d - c @ ridge_step(a, b, ridge)).double().square().sum())
            if error < best:
                best, strength = error, ridge
        return None if strength is None else ridge_step(rows, residual, strength)
    g, cross, gv, crossv = gram(a), gram(a, b), gram(c), gram(c, d)
    for ridge in RIDGES:
        step = ridge_solver(g, ridge)(cross)
        error = base - 2 * float((step * crossv).sum()) + float((step * (gv @ step)).sum())
        if error < best:
            best, strength = error, ridge
    if strength is None:
        return None
    solve = ridge_solver(g + gv, strength)
    step = solve(cross + crossv).to(rows.dtype)
    return step if start is None else _rectified(rows, residual, start, step, solve)


def _rectified(
    rows: Tensor, residual: Tensor, start: Tensor, step: Tensor, solve: Callable[[Tensor], Tensor]
) -> Tensor:
    aim = start + residual
    for _ in range(RELU_STEPS):
        given = start + rows @ step
        hidden = torch.where(aim > 0, aim, given.clamp_max(0)) - start
        step = solve(gram(rows, hidden)).to(rows.dtype)
    return step
