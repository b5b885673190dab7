"""How many calibration images can be afforded, and where to keep activations so that little is computed twice.

Everything is counted (bytes, multiply-adds), nothing is timed, so that the same command gives the same result anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from edgeprune.graph.network import shapes
from edgeprune.prune.program import Program

Sizes = Mapping[str, tuple[int, ...]]
SEGMENTS = 32


def sizes_of(program: Program) -> Sizes:
    """Node name -> shape at batch 1."""
    return shapes(program.network)


def multiply_adds(program: Program, sizes: Sizes) -> list[float]:
    """Per node of the program, for one image: weights per output times outputs for layers, else the outputs."""
    costs = []
    for node in program.nodes:
        outputs = float(math.prod(sizes[node.name])) if node.name in sizes and node.op != "get_attr" else 0.0
        weight: Any = getattr(program.leaf(node), "weight", None) if node.op == "call_module" else None
        costs.append(outputs * (weight[0].numel() if weight is not None and weight.dim() > 1 else 1.0))
    return costs


def live_after(program: Program, sizes: Sizes) -> list[list[str]]:
    """Per node: the values computed so far that a later node reads; inputs, weights and numbers left out."""
    last: dict[str, int] = {}
    for i, node in enumerate(program.nodes):
        for source in program.sources(node):
            last[source.name] = i
    alive: list[str] = []
    result = []
    for i, node in enumerate(program.nodes):
        if node.op in ("call_module", "call_function") and node.name in sizes:
            alive = [*alive, node.name]
        alive = [name for name in alive if last.get(name, -1) > i]
        result.append(alive)
    return result


def peak_bytes(program: Program, sizes: Sizes) -> int:
    """The most bytes of float32 activations alive at one time, for one image."""
    return max(4 * sum(math.prod(sizes[name]) for name in names) for names in live_after(program, sizes))


def frontiers(program: Program, sizes: Sizes) -> list[str]:
    """Values to keep: in each of some segments of equal cost, those alive where the fewest bytes are."""
    costs = list(itertools.accumulate(multiply_adds(program, sizes)))
    live = live_after(program, sizes)
    best: dict[int, tuple[int, int]] = {}
    for i, (cost, names) in enumerate(zip(costs, live, strict=True)):
        segment = min(SEGMENTS - 1, int(SEGMENTS * cost / max(costs[-1], 1.0)))
        size = sum(math.prod(sizes[name]) for name in names)
        if names and (segment not in best or size <= best[segment][0]):
            best[segment] = (size, i)
    chosen = dict.fromkeys(name for _, i in sorted(best.values(), key=lambda b: b[1]) for name in live[i])
    return sorted(chosen, key=program.order.__getitem__)
