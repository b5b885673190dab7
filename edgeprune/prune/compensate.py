"""Closed-form repair of a compressed network from unlabelled inputs.

One pass through the network in graph order. Every convolution and linear is refitted by ridge least squares so that its
target (aims.py), *fed with what the compressed network now gives it*, equals the original's value there; what cannot be
corrected is handed on to the next layer, which sees it in its input. Batch norms keep their function, but their
statistics become those of the new layer, so that training can go on from there.

Source: the reconstruction step of CaP (Xie et al., 2021) and ThiNet (Luo et al., 2017).
Deviations: targets come from the original network throughout; the sum behind a residual branch is matched rather than
the branch, which absorbs the error of removed blocks; errors that a relu behind will hide are not counted (layer.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeprune.graph.network import Network
from edgeprune.prune.afford import multiply_adds, peak_bytes, sizes_of
from edgeprune.prune.aims import Fit, Kept, find_fits, kept_of
from edgeprune.prune.layer import Task, refit_layer
from edgeprune.prune.patches import Positions, channel_dim, output_places, place_count, rows_at, values_at
from edgeprune.prune.program import Batches, Program, Values, as_batches, run, sweep

WORK = 2e10  # multiply-adds spent on one layer's Gram matrix
MAX_ROWS, MIN_ROWS = 32768, 2048
MIN_IMAGES = 16
ACTIVATION_BYTES = 2 << 30
PASS_WORK = 2e12  # multiply-adds of one pass over all images


@dataclass
class Reference:
    """The original's values at sampled positions, computed once and kept as they are asked for.

    Positions depend on the images' number and the value's shape only, so compressed networks are read at the same ones.
    ``inner``: a network of like outputs, for nodes that the original does not have.
    """

    program: Program
    batches: Batches
    inner: Program | None = None
    positions: Positions = field(default_factory=Positions)
    samples: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return sum(len(inputs[0]) for inputs in self.batches)

    def where(self, shape: tuple[int, ...], rows: int) -> tuple[Tensor, ...]:
        return self.positions.pick(self.images, shape, rows)

    def gather(self, wanted: Mapping[str, tuple[int, int]]) -> None:
        """Sample nodes: name -> (channel dim, rows), in one pass over the batches for all that is missing."""
        missing = {name: spec for name, spec in wanted.items() if self.rows.get(name, 0) < spec[1]}
        if not missing:
            return
        found: dict[str, list[Tensor]] = {name: [] for name in missing}
        start = 0
        ours = [name for name in missing if name in self.program.order]
        for inputs in self.batches:
            values = run(self.program, [inputs], ours) if ours else {}
            if self.inner is not None and len(ours) < len(missing):
                values |= run(self.inner, [inputs], [name for name in missing if name not in values])
            for name, (dim, rows) in missing.items():
                x = values[name][0]
                where = self.where(place_count(x, dim), rows)
                low, high = torch.searchsorted(where[0], torch.tensor([start, start + len(x)])).tolist()
                local = (where[0][low:high] - start, *(c[low:high] for c in where[1:]))
                found[name].append(x.movedim(dim, -1)[local])
            start += len(inputs[0])
        for name, parts in found.items():
            self.samples[name], self.rows[name] = torch.cat(parts), missing[name][1]

    def at(self, name: str, rows: int, shape: tuple[int, ...]) -> Tensor:
        """(positions, channels) of a gathered node at the places ``where(shape, rows)``."""
        have = self.samples[name]
        if self.rows[name] == rows:
            return have
        few, many = len(self.where(shape, rows)[0]) // self.images, len(have) // self.images
        return have.reshape(self.images, many, -1)[:, :few].reshape(self.images * few, -1)


def compensate(
    original: Network,
    current: Network,
    batches: Iterable[Any],
    *,
    kept: Kept | None = None,
    images: int | None = None,
    passes: int = 1,
    inner: Network | None = None,
) -> Network:
    """A copy of ``current`` whose weights are refitted to the original's responses. No labels are used.

    current: a cut of ``original`` (node names and module paths are those of the original)
    batches: calibration inputs, (n, ...) tensors or tuples of them; at most ``images`` are used, fewer where their
        activations would take more than 2 GiB
    kept:    module path -> original output channel of each output (``trace_channels``); layers whose outputs were cut
        are left alone without it
    inner:   what tells layers that the original does not have what to give (default: nothing, they are left alone)
    Raises DataError without any image.
    """
    used = as_batches(batches, original, _affordable(original, images))
    reference = Reference(Program(original), used, None if inner is None else Program(inner))
    new = current.copy()
    for _ in range(passes):
        refitted = refit(reference, Program(new), kept=kept)
        _install(new, refitted)
    return new


def _affordable(original: Network, images: int | None) -> int:
    """As many images as were asked for, if all their activations at one place fit into memory."""
    program = Program(original)
    sizes = sizes_of(program)
    limit = min(ACTIVATION_BYTES / peak_bytes(program, sizes), PASS_WORK / sum(multiply_adds(program, sizes)))
    return int(max(MIN_IMAGES, limit if images is None else min(images, limit)))


def _install(network: Network, modules: Mapping[str, nn.Module]) -> None:
    """Take over the tensors of refitted modules."""
    leaf: Any
    for path, leaf in modules.items():
        mine: Any = network.module.get_submodule(path)
        with torch.no_grad():
            mine.weight.copy_(leaf.weight)
            if leaf.bias is not None:
                if mine.bias is None:
                    mine.bias = nn.Parameter(leaf.bias.detach().clone(), requires_grad=mine.weight.requires_grad)
                else:
                    mine.bias.copy_(leaf.bias)
            for name in ("running_mean", "running_var"):
                if getattr(mine, name, None) is not None:
                    getattr(mine, name).copy_(getattr(leaf, name))


def refit(
    reference: Reference,
    program: Program,
    *,
    fits: Sequence[Fit] | None = None,
    only: Collection[str] | None = None,
    kept: Kept | None = None,
    known: Values | None = None,
    rows: int = MAX_ROWS,
    quick: bool = False,
) -> dict[str, nn.Module]:
    """Refitted copies of layers (and their batch norms) of ``program``, by module path.

    only:  names of layer calls to refit; all others run as they are
    known: activations of ``program`` to start from
    rows:  sampled positions per layer, at most
    quick: as of layer.Task
    """
    fits = find_fits(reference.program, program, reference.inner) if fits is None else fits
    chosen = {f.node: f for f in fits if only is None or f.node in only}
    by_name = program.by_name
    plans = {name: _rows_for(program.leaf(by_name[name]), rows) for name in chosen}
    wanted: dict[str, tuple[int, int]] = {}
    for name, f in chosen.items():
        most = max(wanted.get(f.aim, (0, 0))[1], plans[name])
        wanted[f.aim] = (channel_dim(program.leaf(by_name[name])), most)
    with torch.no_grad():
        reference.gather(wanted)
        working = program.exchanged({})
        changed: dict[str, nn.Module] = {}

        def before(node: fx.Node, values: Values) -> None:
            f = chosen.get(node.name)
            if f is not None:
                modules = _fit(reference, working, node, f, values, plans[node.name], kept, quick)
                changed.update(modules)
                working.modules.update(modules)

        ends = [f.node for f in chosen.values()]
        if ends:
            last = max(ends, key=program.order.__getitem__)
            also = {f.node: (f.other,) for f in chosen.values() if f.other is not None}
            sweep(working, reference.batches, before, known, [last], also)
    return changed


def _rows_for(leaf: Any, limit: int) -> int:
    groups = int(getattr(leaf, "groups", 1))
    p = leaf.weight[0].numel() + 1
    return int(min(limit, MAX_ROWS, max(MIN_ROWS, WORK / (groups * p * p))))


def _fit(
    reference: Reference,
    program: Program,
    node: fx.Node,
    f: Fit,
    values: Values,
    rows: int,
    kept: Kept | None,
    quick: bool,
) -> dict[str, nn.Module]:
    leaf, dim = program.leaf(node), channel_dim(program.leaf(node))
    inputs = values[program.sources(node)[0].name]
    shape = output_places(leaf, inputs[0])
    where = reference.where(shape, rows)
    target = reference.at(f.aim, rows, shape)
    selection = kept_of(kept, str(node.target), leaf.weight.shape[0], target.shape[1])
    if selection is None:
        return {}
    if len(selection) < target.shape[1]:
        target = target[:, selection]
    other = values_at(values[f.other], dim, where) if f.other is not None else None
    if other is not None and other.shape != target.shape:
        return {}  # a broadcast sum
    norm = program.leaf(program.by_name[f.norm]) if f.norm is not None else None
    task = Task(rows_at(leaf, inputs, where), target, other, where[0], f.rectified, quick)
    found = refit_layer(leaf, norm, task)
    if found is None:
        return {}
    new, fresh = found
    changed: dict[str, nn.Module] = {str(node.target): new}
    if fresh is not None and f.norm is not None:
        changed[str(program.by_name[f.norm].target)] = fresh
    return changed
