"""Moves of a planner tried on the network itself: a group narrowed by exchanging its readers, a block bypassed.

Nothing is cut: the units that go have their columns at zero in the layers that read them, which get their best weights
for the rest (consumers.py), and a block's neighbours are refitted (depth.py). What was accepted stays so, and the judge
measures from there; the layers that made accepted units fall silent, so that no later refit can use them. Weights are
fitted on one half of the judge's images, errors measured on the other.

Shapes: labels (n,) int64 are classes; a network's loss on them is the cross-entropy of its one output (n, classes).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune.graph.blocks import Block
from edgeprune.graph.channels import Channels
from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES
from edgeprune.plan.problem import Move, Ranking
from edgeprune.prune.aims import find_fits, kept_of
from edgeprune.prune.compensate import Reference
from edgeprune.prune.consumers import find_consumers, without_units
from edgeprune.prune.depth import without_block
from edgeprune.prune.judge import Judge
from edgeprune.prune.patches import channel_dim, place_count, values_at
from edgeprune.prune.program import Program, divergence, outputs, run

# whose statistics run over channels: a zero map between makers and readers would change the others there
NORMS = ("group_norm", "layer_norm", "instance_norm", "rms_norm", "native_group_norm", "native_layer_norm")
ROWS = 8192  # sampled positions at which a layer's output is compared


class NetworkTrials:
    """``Trials`` of plan/problem.py on a judge, which it settles on what was accepted.

    channels, blocks, rankings: of the judge's network, as the problem was built from
    """

    def __init__(
        self, judge: Judge, channels: Channels, blocks: Sequence[Block], rankings: Mapping[str, Ranking]
    ) -> None:
        self.judge = judge
        self.groups = {g.name: g for g in channels.groups}
        self.blocks = {b.name: b for b in blocks}
        self.rankings = rankings
        self.start = judge.program
        few = [tuple(parts) for inputs in judge.batches for parts in zip(*(t.split(8) for t in inputs), strict=True)]
        # a few at once: all layers are sampled in one pass
        self.original = Reference(judge.reference.program, few, judge.reference.inner)
        self.dead: dict[str, np.ndarray] = {}  # module path -> its output channels that nobody reads any more
        self.joined = any(str(n.target).partition("aten.")[2].startswith(NORMS) for n in judge.program.nodes)
        self._now: float | None = None  # the final error of what was accepted

    @torch.no_grad()
    def layer_error(self, move: Move) -> float:
        trial, changed = self._tried(self.judge.program, move)
        if not changed:
            return 0.0
        readers = self._readers(self.blocks[move.name]) if move.width is None else sorted(changed)
        known = self.judge.known_before(changed)
        if not readers:
            found = outputs(trial, self.judge.batches, known)
            return sum(_relative(a, e) for a, e in zip(found, self.judge.expected, strict=True))
        values = run(trial, self.judge.batches, readers, known)
        return sum(self._error_at(trial, name, values[name]) for name in readers)

    @torch.no_grad()
    def output_error(self, move: Move) -> float:
        if self._now is None:
            self._now = self._final(self.judge.program, self.judge.checkpoints)
        trial, changed = self._tried(self.judge.program, move)
        return self._final(trial, self.judge.known_before(changed)) - self._now if changed else 0.0

    @torch.no_grad()
    def accept(self, *moves: Move) -> None:
        """Widths are fitted together, each on the network as it was before all of them."""
        for move in moves:
            if move.width is None:
                self._settle(*self._tried(self.judge.program, move))
        program, changed = self.judge.program, set[str]()
        for move in moves:
            if move.width is not None:
                program, more = self._tried(program, move)
                changed |= more
                units = self.rankings[move.name].order[move.width :]
                for slot in self.groups[move.name].slots:
                    if slot.role in ("out", "channel"):
                        before = self.dead.get(slot.target, np.array([], np.int64))
                        self.dead[slot.target] = np.union1d(before, slot.index[units])
        self._settle(program, changed)

    def restart(self) -> None:
        if self.judge.program is not self.start:
            self.judge.settle(self.start)
        self.dead.clear()
        self._now = None

    def _settle(self, program: Program, changed: set[str]) -> None:
        silent: dict[str, nn.Module] = {}
        called = {n: str(n.target) for n in program.nodes if n.op == "call_module"}
        for node, path in called.items():
            leaf = program.leaf(node)
            if path in self.dead and not self.joined and (new := _silenced(leaf, self.dead[path])) is not leaf:
                silent[path] = new
                changed = changed | {node.name}
        if changed:
            self.judge.settle(program.exchanged(silent), changed)
            self._now = None

    def _tried(self, program: Program, move: Move) -> tuple[Program, set[str]]:
        """The program with the move, and the nodes that give other values for the same inputs; none where what it
        takes away is read by nobody."""
        if move.width is None:
            block = self.blocks[move.name]
            if block.join not in program.order:
                return program, set()
            reference = self.judge.reference
            return without_block(self.judge, block, find_fits(reference.program, program, reference.inner))
        consumers = find_consumers(self.judge, program, self.groups[move.name])
        if not consumers:
            return program, set()
        modules = without_units(consumers, self.rankings[move.name].order[move.width :].tolist())
        changed = {n.name for n in program.nodes if n.op == "call_module" and str(n.target) in modules}
        return program.exchanged(modules), changed

    def _final(self, program: Program, known: Mapping[str, list[Any]]) -> float:
        """Cross-entropy where there are labels that fit, else the divergence of the outputs from the original's."""
        found = outputs(program, self.judge.batches, dict(known))
        labels = self.judge.labels
        if labels is None or len(found) != 1 or found[0].dim() != 2:
            return divergence(found, self.judge.expected)
        return float(F.cross_entropy(found[0].double(), labels.to(found[0].device)))

    def _readers(self, block: Block) -> list[str]:
        """The first layers that see a block's sum: through operators that read nothing else."""
        program, seen, found = self.judge.program, {block.join}, []
        for node in program.nodes:
            sources = {n.name for n in program.sources(node)}
            if sources and sources <= seen:
                if node.op == "call_module" and _mixes(program.leaf(node)):
                    found.append(node.name)
                else:
                    seen.add(node.name)
        return found

    def _error_at(self, program: Program, name: str, values: Sequence[Tensor]) -> float:
        """Relative error of a layer's output against the original's, channels that nobody reads left out."""
        node = program.by_name[name]
        path, dim = str(node.target), channel_dim(program.leaf(node))
        shape = place_count(values[0], dim)
        if not self.original.rows:
            known = (self.original.inner, self.original.program)
            self.original.gather({k: v for program in known if program for k, v in _layers(program).items()})
        expected = self.original.at(name, ROWS, shape)
        actual = values_at(values, dim, self.original.where(shape, ROWS))
        kept = kept_of(self.judge.kept, path, actual.shape[1], expected.shape[1])
        if kept is None:
            return 0.0
        live = torch.ones(actual.shape[1], dtype=torch.bool)
        live[torch.from_numpy(self.dead.get(path, np.array([], np.int64)))] = False
        return _relative(actual[:, live], expected[:, kept][:, live])


def _layers(program: Program) -> dict[str, tuple[int, int]]:
    """What to sample of every layer that mixes channels: its channel dim, how many places."""
    calls = [n for n in program.nodes if n.op == "call_module" and _mixes(program.leaf(n))]
    return {n.name: (channel_dim(program.leaf(n)), ROWS) for n in calls}


def _mixes(leaf: Any) -> bool:
    weight = getattr(leaf, "weight", None)
    return weight is not None and weight.dim() > 1


def _relative(actual: Tensor, expected: Tensor) -> float:
    e = expected.double()
    return float((actual.double() - e).norm() / e.norm().clamp_min(1e-30))


def _silenced(leaf: Any, channels: np.ndarray) -> Any:
    """The layer with these output channels at zero; itself where they are already, or where that is not possible."""
    index = torch.from_numpy(channels)
    if isinstance(leaf, CONV_TRANSPOSES) and leaf.groups > 1:
        return leaf
    new = copy.deepcopy(leaf)
    if isinstance(leaf, BATCH_NORMS) and not leaf.affine:
        tensors: Collection[Tensor] = [new.running_mean]
    else:
        turned = isinstance(leaf, CONV_TRANSPOSES)
        tensors = [t for t in (new.weight.transpose(0, 1) if turned else new.weight, new.bias) if t is not None]
    if not any(bool(t[index].any()) for t in tensors):
        return leaf
    for t in tensors:
        t[index] = 0
    return new
