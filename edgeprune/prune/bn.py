"""Batch-norm statistics, estimated again on calibration inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from edgeprune.graph.network import BATCH_NORMS, Network
from edgeprune.prune.program import Program, Values, as_batches, sweep


def reestimate(
    network: Network, batches: Iterable[Any], *, images: int | None = None, keep_function: bool = False
) -> Network:
    """A copy whose running means and variances are those of the batches (over all images at once, in float64), each
    norm seeing what the norms before it give with their *new* statistics.

    keep_function: change the affine part so that the network computes what it did; only training sees a difference.
    Norms called more than once are left alone. Raises DataError without any image.
    """
    new = network.copy()
    program = Program(new)
    data = as_batches(batches, network, images)
    calls: dict[str, int] = {}
    for node in program.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1

    def before(node: torch.fx.Node, values: Values) -> None:
        if node.op != "call_module" or calls[str(node.target)] > 1:
            return
        norm = program.leaf(node)
        if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None:
            _restate(norm, values[program.sources(node)[0].name], keep_function)

    with torch.no_grad():
        sweep(program, data, before)
    return new


def _restate(norm: Any, parts: list[torch.Tensor], keep_function: bool) -> None:
    dims = [d for d in range(parts[0].dim()) if d != 1]
    count = sum(x.numel() // x.shape[1] for x in parts)
    mean = torch.stack([x.double().sum(dims) for x in parts]).sum(0) / count
    shape = [1, -1, *[1] * (parts[0].dim() - 2)]
    squares = [(x.double() - mean.reshape(shape)).square().sum(dims) for x in parts]
    var = torch.stack(squares).sum(0) / count
    if keep_function and norm.affine:
        scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.double() - norm.running_mean.double() * scale
        norm.weight.copy_(scale * torch.sqrt(var + norm.eps))
        norm.bias.copy_(shift + scale * mean)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
