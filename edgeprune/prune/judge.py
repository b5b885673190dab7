"""Measuring what a small change does to the network's output, cheaply and many times.

A ``Judge`` holds the compressed network as it is, its activations at the entrances of its residual blocks, and the
original's outputs. A change is run from the last entrance before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.graph.blocks import Block, find_blocks
from edgeprune.graph.network import Network, shapes
from edgeprune.prune.aims import Kept
from edgeprune.prune.compensate import Reference
from edgeprune.prune.program import Batches, Program, Values, as_batches, divergence, outputs, run

CHECKPOINT_BYTES = 1 << 30


class Judge:
    """original, current: the network before and after the cuts made so far; ``images`` bounds the calibration images
    that are used (fewer if their activations would not fit into memory)."""

    def __init__(
        self,
        original: Network,
        current: Network,
        batches: Iterable[Any],
        *,
        images: int = 256,
        kept: Kept | None = None,
    ) -> None:
        self.entrances = _entrances(current)
        sizes = shapes(current)
        per_image = 4 * sum(math.prod(sizes[name]) for name in self.entrances)
        images = max(8, min(images, CHECKPOINT_BYTES // max(per_image, 1)))
        self.batches: Batches = as_batches(batches, original, images)
        self.reference = Reference(Program(original), self.batches)
        self.expected = outputs(self.reference.program, self.batches)
        self.kept = kept
        self.settle(Program(current))

    def settle(self, program: Program) -> None:
        """Make ``program`` what changes are compared with."""
        self.program = program
        self.order = {n.name: i for i, n in enumerate(program.nodes)}
        names = [n for n in self.entrances if n in self.order]
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
        first = min(self.order[name] for name in names)
        known = {n: v for n, v in self.checkpoints.items() if self.order[n] <= first}
        with torch.no_grad():
            return run(self.program, self.batches, list(names), known)


def _entrances(network: Network) -> list[str]:
    blocks: tuple[Block, ...] = find_blocks(network)
    return list(dict.fromkeys(b.shortcut for b in blocks))
