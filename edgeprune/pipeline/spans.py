"""The three views of a network joined: which channel groups the counts of each fused kernel depend on.

A *span* is a kernel whose channel counts vary. Its variables are axes reduced to their direction (``w``, not ``49 w``
or ``w + 3``), so that all tensors a kernel touches are expressed by one or two of them. A kernel that touches more
(a concatenation of several groups) varies with its output alone, its inputs in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgeprune.deploy.export import to_onnx
from edgeprune.device.target import Fusion
from edgeprune.graph.blocks import Block, find_blocks
from edgeprune.graph.channels import Channels, analyse
from edgeprune.graph.fold import fold
from edgeprune.graph.network import Network
from edgeprune.graph.ranges import clamp_of, ranges
from edgeprune.latency.fusion import sites
from edgeprune.latency.kernel import Kernel, Site
from edgeprune.plan.problem import Axis


@dataclass(frozen=True, slots=True)
class Dimension:
    """One varying size of a kernel's shapes: ``const + scale * value of variable``. ``tensor`` -1 is the output."""

    tensor: int
    dim: int
    variable: int
    scale: int
    const: int


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel at its place, as a function of at most two variables (axes over group indices)."""

    site: Site
    variables: tuple[Axis, ...]
    dimensions: tuple[Dimension, ...]
    full: tuple[int, ...]
    block: int | None
    proportional: bool = False

    @property
    def name(self) -> str:
        return self.site.name

    def at(self, counts: tuple[int, ...]) -> Kernel:
        """The kernel when the variables have these values."""
        kernel = self.site.kernel
        inputs = [list(s) for s in kernel.inputs]
        output = list(kernel.output)
        for d in self.dimensions:
            shape = output if d.tensor < 0 else inputs[d.tensor]
            count = counts[d.variable]
            if self.proportional and d.tensor >= 0:
                shape[d.dim] = max(1, round(shape[d.dim] * count / self.full[d.variable]))
            else:
                shape[d.dim] = d.const + d.scale * count
        return replace(kernel, inputs=tuple(map(tuple, inputs)), output=tuple(output))


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A network seen as nodes, channel groups, removable blocks and kernels. ``channels`` and ``blocks`` belong to
    ``network``; the spans come from its folded form and index ``channels.groups``."""

    network: Network
    folded: Network
    channels: Channels
    blocks: tuple[Block, ...]
    spans: tuple[Span, ...]
    group_blocks: tuple[int | None, ...]


def dissect(network: Network, fusion: Fusion | None = None) -> Anatomy:
    """Analyse a network for planning; ``fusion`` says what the target's runtime makes of it.

    Raises UnsupportedModelError for operators that cannot be exported.
    """
    channels, blocks = analyse(network), find_blocks(network)
    folded = fold(network)
    axes = _Axes(channels, analyse(folded))
    block_of_node = {node: i for i, block in enumerate(blocks) for node in block.nodes}
    group_blocks = _group_blocks(network, channels, block_of_node)
    block_of_node |= _idle_clamps(network, blocks)
    spans = tuple(_span(site, axes, block_of_node) for site in sites(to_onnx(folded), fusion))
    return Anatomy(network, folded, channels, blocks, spans, group_blocks)


def _idle_clamps(network: Network, blocks: Sequence[Block]) -> dict[str, int]:
    """The clamps behind a block whose shortcut lies within their bounds by itself: each goes with the block, since
    folding drops it then."""
    known = ranges(network.module)
    nodes = {n.name: n for n in network.module.graph.nodes}
    found: dict[str, int] = {}
    for i, block in enumerate(blocks):
        low, high = known[nodes[block.shortcut]]
        for user in nodes[block.join].users:
            clamp = clamp_of(user)
            if clamp is not None and clamp[0] <= low and high <= clamp[1]:
                found[user.name] = i
    return found


class _Axes:
    """The sizes of the folded network's tensors as functions of the unfolded network's groups.

    A node keeps its name only with its value, and then the unfolded network's labels hold: a shortcut that folding took
    into a convolution still ties its channels to those of the input. Other nodes have labels in the folded network
    alone, whose groups are told by what makes their units: there a group may be a part of one of the unfolded network.
    """

    def __init__(self, channels: Channels, folded: Channels):
        self.channels, self.folded = channels, folded
        by_name = {g.name: i for i, g in enumerate(channels.groups)}
        by_maker = {s.target: i for i, g in enumerate(channels.groups) for s in g.slots if s.role == "out"}
        self.index: list[int | None] = []
        for group in folded.groups:
            made = {by_maker.get(slot.target) for slot in group.slots if slot.role == "out"}
            i = by_name.get(group.name, made.pop() if len(made) == 1 else None)
            self.index.append(i if i is not None and channels.groups[i].size == group.size else None)
        self.widths = {i: g.size for i, g in enumerate(channels.groups)}

    def shape(self, node: str) -> tuple[int, ...] | None:
        labels = self.folded.labels.get(node)
        return None if labels is None else tuple(labels.shape)

    def axis(self, node: str, dim: int) -> Axis | None:
        """None when it touches a group that has no counterpart in the unfolded network."""
        known = self.channels.labels.get(node)
        if known is not None and tuple(known.shape) == self.shape(node):
            return self.channels.axis(node, dim)
        axis = self.folded.axis(node, dim)
        terms = [(self.index[g], m) for g, m in axis.terms]
        if any(g is None for g, _ in terms):
            return None
        return Axis(tuple(sorted((int(g), m) for g, m in terms if g is not None)), axis.const)


def _group_blocks(network: Network, channels: Channels, block_of_node: dict[str, int]) -> tuple[int | None, ...]:
    """The block each group lies wholly inside of, if any."""
    calls: dict[str, list[str]] = {}
    for node in network.module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            users = [node.name] if node.op == "call_module" else [u.name for u in node.users]
            calls.setdefault(str(node.target), []).extend(users)
    result: list[int | None] = []
    for group in channels.groups:
        homes = {block_of_node.get(n) for slot in group.slots for n in calls.get(slot.target, [])}
        result.append(homes.pop() if len(homes) == 1 else None)
    return tuple(result)


def _span(site: Site, axes: _Axes, block_of_node: dict[str, int]) -> Span:
    found: list[tuple[int, int, Axis]] = []
    kernel = site.kernel
    block = block_of_node.get(site.anchor_output, block_of_node.get(site.output))
    tensors = [*((i, name, kernel.inputs[i]) for i, name in enumerate(site.inputs)), (-1, site.output, kernel.output)]
    for tensor, name, shape in tensors:
        # the tensor may be a step inside one graph node's operator
        owner = name if axes.shape(name) is not None else name.rpartition(".")[0]
        sizes = axes.shape(owner)
        if sizes is None:
            continue
        for dim in range(min(len(shape), len(sizes))):
            if shape[dim] != sizes[dim]:
                continue
            axis = axes.axis(owner, dim)
            if axis is None:  # what cannot be told of one tensor must not be changed in the others
                return Span(site, (), (), (), block)
            if axis.terms:
                found.append((tensor, dim, axis))
    variables = list(dict.fromkeys(_direction(axis)[0] for _, _, axis in found))
    proportional = len(variables) > 2
    if proportional:
        outputs = [f for f in found if f[0] < 0]
        variables = list(dict.fromkeys(_direction(axis)[0] for _, _, axis in outputs))[:1]
        if not variables:
            return Span(site, (), (), (), block)
    dimensions = []
    for tensor, dim, axis in found:
        direction, scale = _direction(axis)
        if direction in variables:
            dimensions.append(Dimension(tensor, dim, variables.index(direction), scale, axis.const))
        elif proportional and tensor >= 0:
            dimensions.append(Dimension(tensor, dim, 0, 1, 0))
    return Span(
        site, tuple(variables), tuple(dimensions), tuple(v.at(axes.widths) for v in variables), block, proportional
    )


def _direction(axis: Axis) -> tuple[Axis, int]:
    scale = math.gcd(*(m for _, m in axis.terms))
    return Axis(tuple((g, m // scale) for g, m in axis.terms)), scale
