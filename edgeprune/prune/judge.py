"""Measuring what a small change does to the network's output, cheaply and many times.

A ``Judge`` holds the compressed network as it is, some of its activations, and the original's outputs. A change is run
from the last activations before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.graph.network import Network
from edgeprune.prune.afford import frontiers, multiply_adds, sizes_of
from edgeprune.prune.aims import Kept
from edgeprune.prune.compensate import Reference
from edgeprune.prune.program import Batches, Program, Values, as_batches, divergence, outputs, run

CHECKPOINT_BYTES = 1 << 30
WORK = 1e13  # multiply-adds that all trials together may take
MIN_IMAGES = 16


class Judge:
    """original, current: the network before and after the cuts made so far. ``images`` bounds the calibration images
    that are used; fewer are if ``trials`` runs of half the network would take too long or too much memory."""

    def __init__(
        self,
        original: Network,
        current: Network,
        batches: Iterable[Any],
        *,
        images: int = 256,
        trials: int = 100,
        kept: Kept | None = None,
    ) -> None:
        program = Program(current)
        sizes = sizes_of(program)
        self.kept_nodes = frontiers(program, sizes)
        by_memory = CHECKPOINT_BYTES / max(4 * sum(math.prod(sizes[name]) for name in self.kept_nodes), 1)
        by_work = WORK / max(trials * sum(multiply_adds(program, sizes)) / 2, 1)
        images = int(max(MIN_IMAGES, min(images, by_memory, by_work)))
        self.batches: Batches = as_batches(batches, original, images)
        self.reference = Reference(Program(original), self.batches)
        self.expected = outputs(self.reference.program, self.batches)
        self.kept = kept
        self.settle(program)

    def settle(self, program: Program) -> None:
        """Make ``program`` what changes are compared with."""
        self.program = program
        self.order = program.order
        names = [n for n in self.kept_nodes if n in self.order]
        with torch.no_grad():
            values = run(program, self.batches, [*names, program.output.name])
        final = values.pop(program.output.name)
        self.checkpoints: Values = values
        self.divergence = divergence([torch.cat(parts) for parts in zip(*final, strict=True)], self.expected)

    def known_before(self, changed: Collection[str]) -> Values:
        """The checkpoints that a change of these nodes leaves valid."""
        first = min(self.order[name] for name in changed)
        return {name: v for name, v in self.checkpoints.items() if self.order[name] < first}

    def error(self, program: Program, changed: Collection[str]) -> float:
        """Output divergence of a changed program from the original; ``changed``: all nodes that now give other values
        for the same inputs."""
        return divergence(outputs(program, self.batches, self.known_before(changed)), self.expected)

    def exchanged_error(self, modules: Mapping[str, nn.Module]) -> float:
        """Output divergence with some modules exchanged."""
        changed = [n.name for n in self.program.nodes if n.op == "call_module" and str(n.target) in modules]
        return self.error(self.program.exchanged(modules), changed)

    def values(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Activations of the present program, from the nearest checkpoints."""
        with torch.no_grad():
            return run(self.program, self.batches, list(dict.fromkeys(names)), self.checkpoints)
