"""A convolution and its own shortcut become one convolution.

Source: re-parametrised residual layers (ResConv, Xu et al., 2020; the identity branch of RepVGG, Ding et al., 2021).
For ``y = p * A(conv(x)) + s * x + t`` with A affine per channel, the shortcut is the convolution with the Dirac kernel:

    W' = diag(p a) W + diag(s) Delta,    b' = p (a b + shift) + t
    Delta[o, i, centre] = 1 where input i of o's group is channel o, else 0

Shapes: W is (C, C / groups, *k); p, s, t and A are () or (C,), float64 until the one rounding at the end.
Deviations: none. Exact where the centre tap reads the position that is written: as many channels in as out, stride 1,
an odd kernel, zero padding of dilation * (k - 1) / 2; any dilation and groups. Everything else is refused. Zero padding
does no harm, since the centre tap never reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from edgeprune.graph.affine import Affine, Link, Shortcut
from edgeprune.graph.affine_nodes import ADD, SUB, AffineNodes
from edgeprune.graph.network import CONV_TRANSPOSES, CONVS


def refusal(leaf: Any) -> str | None:
    """Why a layer cannot hold its own shortcut, None if it can."""
    if isinstance(leaf, CONV_TRANSPOSES):
        return "is transposed"
    if not isinstance(leaf, CONVS):
        return "is no convolution"
    if leaf.in_channels != leaf.out_channels:
        return f"changes the number of channels ({leaf.in_channels} to {leaf.out_channels})"
    if any(s != 1 for s in leaf.stride):
        return f"has stride {'x'.join(map(str, leaf.stride))}"
    if any(k % 2 == 0 for k in leaf.kernel_size):
        return f"has an even kernel ({'x'.join(map(str, leaf.kernel_size))}), which has no centre"
    wanted = tuple(d * (k - 1) // 2 for d, k in zip(leaf.dilation, leaf.kernel_size, strict=True))
    padding = wanted if leaf.padding == "same" else (0,) * len(wanted) if leaf.padding == "valid" else leaf.padding
    if tuple(padding) != wanted:
        return f"changes the size of the map (padding {'x'.join(map(str, padding))}, not {'x'.join(map(str, wanted))})"
    if leaf.padding_mode != "zeros" and any(wanted):
        return f"pads with {leaf.padding_mode}"
    return None


def residual_links(
    nodes: AffineNodes, node: fx.Node, tail: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, list[Link]] | None:
    """If ``node`` adds to a convolution's affine output an affine map of that convolution's input: the convolution's
    call and what ``node`` does behind its output, else None.

    tail: end of a chain of affine maps -> the call of the layer that will give its value
    """
    if node.op != "call_function" or node.target not in (ADD, SUB) or len(node.args) != 2:
        return None
    if set(node.kwargs) - {"alpha"} or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    first: Any = node.args[0]
    second: Any = node.args[1]
    alpha: Any = node.kwargs.get("alpha", 1)
    factor = float(alpha) if node.target is ADD else -float(alpha)
    for end, other, p, q in ((first, second, 1.0, factor), (second, first, factor, 1.0)):
        producer = tail.get(end)
        if producer is None or len(end.users) != 1 or refusal(nodes.leaf(producer)) is not None:
            continue
        shortcut = _map_of_input(nodes, other, producer)
        if shortcut is not None:
            own = Affine(shortcut.scale.new_tensor(p), shortcut.scale.new_zeros(()))
            return producer, [own, Shortcut(q * shortcut.scale, q * shortcut.shift)]
    return None


def _map_of_input(nodes: AffineNodes, node: fx.Node, producer: fx.Node) -> Affine | None:
    """What ``node`` is of the input of ``producer``, if it is a per-channel affine map of it."""
    chain: list[Affine] = []
    while node is not producer.args[0]:
        source = nodes.source(node)
        affine = nodes.affine(node, producer) if source is not None else None
        if source is None or affine is None:
            return None
        chain.append(affine)
        node = source
    scale, shift = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for affine in reversed(chain):
        scale, shift = affine.scale * scale, affine.scale * shift + affine.shift
    return Affine(scale, shift)
