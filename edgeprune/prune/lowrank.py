"""Which filters and input slices of a convolution stay in a triple (graph/factor.py), and their best combination.

Source: FP-OMP and FP-Backward of Purohit et al. (TMLR 2024), both sides, in their low-rank form.

    selection     as prune/select/fp.py, on the Gram matrix of one side
    compensation  lambda by least squares on the weights; then, where there are images, a ridge step from there that
                  makes the layer's *outputs* come out best: with W (q, m) the packed weight, C (q, q) the covariance of
                  what it reads, T (q, q') the 1x1 in front spread over the taps and B (q', r) the kept filters,
                      input side   core += (T'CT + ridge)^-1 T'C (W - T core)
                      output side  out' += (B'T'CTB + ridge)^-1 B'T'C (W - T B out')

Shapes: as patches.py, q = taps * channels with the taps outermost, m outputs; all float64.
Deviations: with images, filters are compared by the outputs that they give, W'CW, and slices are scaled by how much
their inputs vary. Means go into the bias, so covariances are all that counts. Kept input slices are refitted, not only
mixed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeprune.graph.factor import Triple, combined
from edgeprune.plan.problem import Factoring
from edgeprune.prune.consumers import MAX_COLUMNS, RIDGE, ROWS
from edgeprune.prune.gram import gram, penalties, solver
from edgeprune.prune.judge import Judge
from edgeprune.prune.patches import output_places, pack, rows_at
from edgeprune.prune.program import Program

Choose = Callable[[Tensor], list[int]]  # (units, units) products of one side -> units, most important first


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution without groups, and what it reads.

    weight:     (q, m)
    covariance: (q, q) of its input patches, times their number; None: nothing is known of them
    mean:       (q,) of its input patches
    """

    leaf: Any
    weight: Tensor
    covariance: Tensor | None
    mean: Tensor

    @property
    def taps(self) -> int:
        return int(self.leaf.weight[0, 0].numel())


def observe(program: Program, node: fx.Node, judge: Judge | None = None) -> Layer:
    """The layer that ``node`` calls; with the covariance of its inputs on the judge's fitting images, if they are given
    and the matrix is not too large."""
    leaf = program.leaf(node)
    weight = pack(leaf).double().cpu()[:-1]
    if judge is None or len(weight) >= MAX_COLUMNS:
        return Layer(leaf, weight, None, torch.zeros(len(weight), dtype=torch.float64))
    name = program.sources(node)[0].name
    values = judge.values([name])[name]
    where = judge.reference.where(output_places(leaf, values[0]), max(2048, int(min(ROWS, 1e10 / len(weight) ** 2))))
    g = gram(rows_at(leaf, values, where)).cpu()
    mean = g[-1, :-1] / g[-1, -1]
    return Layer(leaf, weight, g[:-1, :-1] - torch.outer(g[-1, :-1], mean), mean)


def select(layer: Layer, choose: Choose) -> tuple[list[int], list[int]]:
    """(input slices, filters), most important first."""
    slices = _by_channel(layer.weight, layer.taps).transpose(0, 1).flatten(1)  # (n, taps * m)
    if layer.covariance is not None:
        spread = layer.covariance.diagonal().reshape(layer.taps, -1).mean(0).clamp_min(0).sqrt()
        slices = slices * spread[:, None]
        filters = layer.weight.T @ (layer.covariance @ layer.weight)
    else:
        filters = layer.weight.T @ layer.weight
    return choose(slices @ slices.T), choose(filters)


def fit(layer: Layer, factoring: Factoring) -> Triple:
    """The triple of a factoring's slices and filters whose outputs come nearest to the layer's; all its tensors are
    float64."""
    shape, taps, c = layer.leaf.weight.shape, layer.taps, layer.covariance
    wanted, core = layer.weight, layer.weight  # (q, m)
    into = out = None
    if factoring.inputs is not None:
        kept = list(factoring.inputs)
        into = combined(_by_channel(core, taps).transpose(0, 1), kept).T  # (r, n)
        core = _by_channel(core, taps)[:, kept].flatten(0, 1)
    reads: Tensor | None = None
    products: Tensor | None = None
    if c is not None:  # what the core reads: its covariance, and its products with what is wanted
        products = _through(into, (c @ wanted), taps)
        reads = c if into is None else _through(into, _through(into, c, taps).T, taps)
        if into is not None:
            core = core + _step(reads, products - reads @ core)
    if factoring.outputs is not None:
        kept = list(factoring.outputs)
        all_filters, core = core, core[:, kept]
        out = combined(all_filters.T, kept)  # (m, r)
        if reads is not None and products is not None:
            given = core.T @ reads @ core
            out = out + _step(given, core.T @ products - given @ out.T).T
    columns = len(core) // taps
    kernel = core.reshape(taps, columns, -1).permute(2, 1, 0).reshape(-1, columns, *shape[2:])
    triple = Triple(kernel, into, out)
    return replace(triple, bias=_bias(layer, triple))


def error(layer: Layer, triple: Triple) -> float:
    """Squared error of the layer's outputs, relative to their variance; of its weights, where inputs are not known."""
    return _energy(layer, layer.weight - _packed(triple.composed())) / max(_energy(layer, layer.weight), 1e-30)


def dense(layer: Layer, triple: Triple) -> nn.Module:
    """A copy of the layer that gives what the triple gives: for trials, which exchange modules only."""
    new = copy.deepcopy(layer.leaf)
    with torch.no_grad():
        new.weight.copy_(triple.composed())
        new.bias = None if triple.bias is None else nn.Parameter(triple.bias.to(new.weight), requires_grad=False)
    return new


def damage(judge: Judge, path: str, layer: Layer, triple: Triple) -> float:
    """How much the error of the network's outputs grows with the triple in the layer's place, in the unit of
    ``Ranking.damage``."""
    return max(judge.exchanged_error({path: dense(layer, triple)}) - judge.divergence, 0.0)


def _bias(layer: Layer, triple: Triple) -> Tensor | None:
    """The layer's, and what the means of its inputs lose."""
    own = layer.leaf.bias
    if layer.covariance is None:
        return None if own is None else own.detach().double().cpu()
    lost = layer.mean @ (layer.weight - _packed(triple.composed()))
    return lost if own is None else own.detach().double().cpu() + lost


def _step(reads: Tensor, left: Tensor) -> Tensor:
    """(reads + ridge)^-1 left."""
    return solver(reads, penalties(reads, RIDGE, bias=False))(left)


def _by_channel(weight: Tensor, taps: int) -> Tensor:
    """(taps * channels, m) as (taps, channels, m)."""
    return weight.reshape(taps, -1, weight.shape[1])


def _through(into: Tensor | None, rows: Tensor, taps: int) -> Tensor:
    """T' rows: (taps * n, k) as the core sees it behind the 1x1, (taps * r, k)."""
    return rows if into is None else (into @ _by_channel(rows, taps)).flatten(0, 1)


def _packed(weight: Tensor) -> Tensor:
    """(m, n, *K) as (taps * n, m)."""
    return weight.flatten(2).permute(2, 1, 0).flatten(0, 1)


def _energy(layer: Layer, weight: Tensor) -> float:
    product = weight if layer.covariance is None else layer.covariance @ weight
    return float((weight * product).sum())
