"""What each layer of a compressed network should give, and which of the original's channels that is.

A layer's *target* is the first place behind it where its error can be corrected by nobody else: behind its batch norm,
and behind the addition if it ends a residual branch whose other operand is already there. Its *aim* is the original's
value that stands at that place: when blocks behind it were removed, its sum must serve for the sum at the end of the
removed run, and then it aims there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS, DROPOUTS, Network
from edgeprune.graph.ops import Kind, arguments, kind_of
from edgeprune.prune.patches import refittable
from edgeprune.prune.program import Program

aten = torch.ops.aten
Kept = Mapping[str, Tensor]  # module path -> original output channel of each of its output channels


@dataclass(frozen=True, slots=True)
class Fit:
    """One layer that can be refitted.

    node:   name of the layer's call
    norm:   name of the batch norm behind it, if any
    target: name of the node whose value is to be matched
    other:  name of the other operand if the target is an addition
    aim:    name of the original's node that the target stands for
    rectified: whether relus are all that reads the target
    """

    node: str
    norm: str | None
    target: str
    other: str | None
    aim: str
    rectified: bool = False


def find_fits(original: Program, current: Program, inner: Program | None = None) -> list[Fit]:
    """All layers of ``current`` that can be refitted, in graph order. Layers called more than once are left alone, and
    so are those that the original lacks (inside a factored convolution), unless ``inner`` has them: then its values are
    what they should give."""
    calls = count_calls(current)
    fits = []
    for node in current.nodes:
        if node.op != "call_module" or calls[str(node.target)] > 1 or not refittable(current.leaf(node)):
            continue
        source = original if node.name in original.order else inner
        if source is None or node.name not in source.order:
            continue
        end, norm = behind_norm(current, node, calls)
        target, other = _join(current, end, current.order[node.name])
        aim = _aim(source, current, target)
        if aim not in source.order and target is not end:
            target, other, aim = end, None, _aim(source, current, end)
        if aim in source.order:
            names = (norm.name if norm else None, target.name, other.name if other else None)
            readers = _readers(current, target)
            rectified = bool(readers) and all(_is_relu(r) for r in readers)
            fits.append(Fit(node.name, *names, aim, rectified))
    return fits


def count_calls(program: Program) -> dict[str, int]:
    """Module path -> how often it is called."""
    return Counter(str(node.target) for node in program.nodes if node.op == "call_module")


def _readers(program: Program, node: fx.Node) -> list[fx.Node]:
    return [u for u in program.users[node.name] if u.op != "call_function" or kind_of(u.target) is not Kind.SIZE]


def behind_norm(program: Program, node: fx.Node, calls: Mapping[str, int]) -> tuple[fx.Node, fx.Node | None]:
    """The end of the affine tail layer -> batch norm -> dropout, and that batch norm."""
    end, norm = node, None
    while len(readers := _readers(program, end)) == 1 and readers[0].op == "call_module":
        leaf = program.leaf(readers[0])
        fits = isinstance(leaf, BATCH_NORMS) and leaf.running_mean is not None and calls[str(readers[0].target)] == 1
        if fits and norm is None and leaf.affine and not isinstance(program.leaf(node), nn.Linear):
            norm = end = readers[0]
        elif isinstance(leaf, DROPOUTS):
            end = readers[0]
        else:
            break
    return end, norm


def _join(program: Program, end: fx.Node, position: int) -> tuple[fx.Node, fx.Node | None]:
    """(addition, its other operand) if ``end`` is only read by one whose other operand is computed earlier."""
    readers = _readers(program, end)
    if len(readers) == 1 and readers[0].target is aten.add.Tensor:
        args = arguments(readers[0])
        operands = [program.through(a) for a in (args["self"], args["other"]) if isinstance(a, fx.Node)]
        if len(operands) == 2 and operands[0] is not operands[1] and args["alpha"] == 1:
            other = operands[1] if operands[0] is end else operands[0]
            if program.order[other.name] < position and other.op != "get_attr":
                return readers[0], other
    return end, None


def _aim(original: Program, current: Program, target: fx.Node) -> str:
    """The original's node that ``target`` stands for; see the module's docstring."""
    aim, node = target.name, target
    while True:
        stand = _stands_for(original, current, node)
        readers = _readers(current, node)
        if stand is not None and stand != node.name:
            if node is target or (readers and all(_is_relu(r) for r in readers)):
                aim = stand
            elif _is_relu(original.by_name[stand]):
                aim = original.sources(original.by_name[stand])[0].name
        if len(readers) != 1 or not _is_relu(readers[0]):
            return aim
        node = readers[0]


def _is_relu(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is aten.relu.default


def _stands_for(original: Program, current: Program, node: fx.Node) -> str | None:
    """What the readers of ``node`` read at that place in the original: the last such node in graph order."""
    found: set[str] = set()
    for user in _readers(current, node):
        twin = original.by_name.get(user.name)
        if twin is None:
            continue
        mine, theirs = _operands(user), _operands(twin)
        if len(mine) == len(theirs):
            found |= {original.through(b).name for a, b in zip(mine, theirs, strict=True) if current.through(a) is node}
    return max((f for f in found if f in original.order), key=original.order.__getitem__, default=None)


def _operands(node: fx.Node) -> list[fx.Node]:
    operands: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), operands.append)
    return operands


def trace_channels(original: Network, apply: Callable[[Network], Network]) -> dict[str, Tensor]:
    """Which output channels of every module survive ``apply`` (cuts and removals), in the original's numbering.

    The channels of a copy are numbered in its weights, the copy is cut, and the numbers are read off.
    """
    marked = original.copy()
    for path, channels, view in _numbered(marked):
        view(marked.module.get_submodule(path), torch.arange(channels, dtype=torch.float32))
    return {path: _read(leaf) for path, leaf in _weighted(apply(marked))}


def _weighted(network: Network) -> list[tuple[str, Any]]:
    kinds = (*CONVS, *CONV_TRANSPOSES, *BATCH_NORMS, nn.Linear)
    found: list[tuple[str, Any]] = [(path, network.module.get_submodule(path)) for path in network.modules_called()]
    return [(path, leaf) for path, leaf in found if isinstance(leaf, kinds) and leaf.weight is not None]


def _numbered(network: Network) -> list[tuple[str, int, Callable[[Any, Tensor], None]]]:
    def write(leaf: Any, numbers: Tensor) -> None:
        weight = leaf.weight
        shape = [1] * weight.dim()
        if isinstance(leaf, CONV_TRANSPOSES):
            numbers = numbers.reshape(leaf.groups, -1).repeat_interleave(weight.shape[0] // leaf.groups, 0)
            numbers = numbers.reshape(*weight.shape[:2], *shape[2:])
        else:
            numbers = numbers.reshape(-1, *shape[1:])
        leaf.weight = nn.Parameter(numbers.expand(weight.shape).clone())

    found: list[tuple[str, int, Callable[[Any, Tensor], None]]] = []
    for path, leaf in _weighted(network):
        channels = leaf.out_channels if isinstance(leaf, CONV_TRANSPOSES) else leaf.weight.shape[0]
        found.append((path, int(channels), write))
    return found


def _read(leaf: Any) -> Tensor:
    weight: Tensor = leaf.weight.detach()
    flat = weight.flatten(2)[..., 0] if weight.dim() > 2 else weight
    if isinstance(leaf, CONV_TRANSPOSES):
        per_group = flat.reshape(leaf.groups, -1, flat.shape[1])
        return per_group[:, 0].reshape(-1).long()
    return (flat if flat.dim() == 1 else flat[:, 0]).long()


def kept_of(kept: Kept | None, path: str, channels: int, originally: int) -> Tensor | None:
    """Original channels of a module's outputs; None where that is not known."""
    if kept is not None and path in kept:
        return kept[path]
    return torch.arange(channels) if channels == originally else None
