"""Measuring what a small change does to the network's output, cheaply and many times.

A ``Judge`` holds the compressed network as it is, some of its activations, and the original's outputs. A change is run
from the last activations before it.

Trial refits see one half of the images, damage is measured on the other: a layer with many weights and few places (the
last ones, above all) could else make up for anything on the images it was fitted to, and look free to cut.
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
from edgeprune.prune.program import MINI_BATCH, Batches, Program, Values, as_batches, divergence, outputs, run

CHECKPOINT_BYTES = 1 << 30
WORK = 1e13  # multiply-adds that all trials together may take
MIN_IMAGES = 16


class Judge:
    """original, current: the network before and after the cuts made so far. ``images`` bounds the calibration images
    that are used, both halves together; fewer are if ``trials`` runs of half the network would take too long or too
    much memory. A single image serves as both halves. ``labels`` ((n,) classes of all images of ``batches``, in order)
    are kept for those that are measured, and used by nothing here. ``inner``: as of compensate.Reference."""

    def __init__(
        self,
        original: Network,
        current: Network,
        batches: Iterable[Any],
        *,
        images: int = 256,
        trials: int = 100,
        kept: Kept | None = None,
        labels: Tensor | None = None,
        inner: Network | None = None,
    ) -> None:
        program = Program(current)
        sizes = sizes_of(program)
        self.kept_nodes = frontiers(program, sizes)
        by_memory = CHECKPOINT_BYTES / max(4 * sum(math.prod(sizes[name]) for name in self.kept_nodes), 1)
        by_work = 2 * WORK / max(trials * sum(multiply_adds(program, sizes)) / 2, 1)
        images = int(max(MIN_IMAGES, min(images, by_memory, by_work)))
        together = as_batches(batches, original, images)
        self.fitting, self.batches = _halves(together)
        first = sum(len(inputs[0]) for inputs in self.fitting) if self.fitting is not self.batches else 0
        measured = sum(len(inputs[0]) for inputs in self.batches)
        self.labels = None if labels is None else labels[first : first + measured]
        known = None if inner is None else Program(inner)
        self.reference = Reference(Program(original), self.fitting, known)
        self.expected = outputs(self.reference.program, self.batches)
        self.kept = kept
        self.settle(program)

    def settle(self, program: Program, changed: Collection[str] = ()) -> None:
        """Make ``program`` what changes are compared with. changed: its nodes that give other values than the present
        program's for the same inputs, where they are known: what lies before them is not computed again."""
        known, fit_known = (self.known_before(changed, fitting) if changed else {} for fitting in (False, True))
        self.program = program
        self.order = program.order
        names = [n for n in self.kept_nodes if n in self.order]
        with torch.no_grad():
            values = run(program, self.batches, [*names, program.output.name], known)
            self.fit_checkpoints: Values = run(program, self.fitting, names, fit_known) if names else {}
        final = values.pop(program.output.name)
        self.checkpoints: Values = values
        self.divergence = divergence([torch.cat(parts) for parts in zip(*final, strict=True)], self.expected)

    def known_before(self, changed: Collection[str], fitting: bool = False) -> Values:
        """The checkpoints that a change of these nodes leaves valid, of the images that are measured or fitted on."""
        first = min(self.order[name] for name in changed)
        checkpoints = self.fit_checkpoints if fitting else self.checkpoints
        return {name: v for name, v in checkpoints.items() if self.order[name] < first}

    def error(self, program: Program, changed: Collection[str]) -> float:
        """Output divergence of a changed program from the original; ``changed``: all nodes that now give other values
        for the same inputs."""
        return divergence(outputs(program, self.batches, self.known_before(changed)), self.expected)

    def exchanged_error(self, modules: Mapping[str, nn.Module]) -> float:
        """Output divergence with some modules exchanged."""
        changed = [n.name for n in self.program.nodes if n.op == "call_module" and str(n.target) in modules]
        return self.error(self.program.exchanged(modules), changed)

    def values(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        """Activations of the present program on the fitting images, from the nearest checkpoints."""
        with torch.no_grad():
            return run(self.program, self.fitting, list(dict.fromkeys(names)), self.fit_checkpoints)


def _halves(batches: Batches) -> tuple[Batches, Batches]:
    joined = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    middle = len(joined[0]) // 2
    if middle == 0:
        return batches, batches
    parts = [list(zip(*(t.split(MINI_BATCH) for t in half), strict=True))
             for half in ([t[:middle] for t in joined], [t[middle:] for t in joined])]  # fmt: skip
    return parts[0], parts[1]
