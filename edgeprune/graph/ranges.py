"""Between which bounds the values of every node lie, whatever the network is shown.

Used to find clamps that change nothing: a relu of what cannot be negative. Bounds hold for arithmetic as it is done in
single precision, so an average has no upper bound here: rounding may carry it over the largest of its terms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from edgeprune.graph import ops
from edgeprune.graph.network import DROPOUTS
from edgeprune.graph.ops import Kind, arguments, name_of

Range = tuple[float, float]

ANY: Range = (-math.inf, math.inf)
_FIXED: dict[str, Range] = {
    "sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0), "softmax": (0.0, 1.0), "_softmax": (0.0, 1.0),
    "tanh": (-1.0, 1.0), "square": (0.0, math.inf), "exp": (0.0, math.inf), "softplus": (0.0, math.inf),
}  # fmt: skip
_AVERAGES = (
    "avg_pool",
    "adaptive_avg_pool",
    "upsample_linear",
    "upsample_bilinear",
    "upsample_trilinear",
    "mean",
    "sum",
)
_SAME = ("max_pool", "adaptive_max_pool", "upsample_nearest", "_upsample_nearest", "amax", "clone", "contiguous")


def ranges(module: fx.GraphModule) -> dict[fx.Node, Range]:
    """Node -> (low, high), infinite where nothing is known. Dropouts are idle, as in evaluation mode."""
    found: dict[fx.Node, Range] = {}
    for node in module.graph.nodes:
        found[node] = _range(module, node, found)
    return found


def clamp_of(node: fx.Node) -> Range | None:
    """The bounds that ``node`` holds its input within, if that is all it does."""
    if node.op != "call_function":
        return None
    name, args = name_of(node.target), arguments(node)
    if not args:
        return None
    if name == "relu":
        return (0.0, math.inf)
    if name == "relu6":
        return (0.0, 6.0)
    if name == "hardtanh":
        return _bounds(args["min_val"], args["max_val"])
    if name == "clamp":
        return _bounds(args["min"], args["max"])
    if name == "clamp_min":
        return _bounds(args["min"], None)
    if name == "clamp_max":
        return _bounds(None, args["max"])
    return None


def _bounds(low: Any, high: Any) -> Range | None:
    if not all(v is None or isinstance(v, (int, float)) for v in (low, high)):
        return None
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _range(module: fx.GraphModule, node: fx.Node, found: dict[fx.Node, Range]) -> Range:
    if node.op == "get_attr":
        tensor = operator.attrgetter(str(node.target))(module)
        constant = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > 0
        return (tensor.min().item(), tensor.max().item()) if constant else ANY
    if node.op == "call_module":
        idle = isinstance(module.get_submodule(str(node.target)), DROPOUTS)
        return found[node.args[0]] if idle else ANY  # type: ignore[index]
    if node.op != "call_function":
        return ANY
    if node.target is operator.getitem:
        source: Any = node.args[0]
        indices = name_of(source.target).endswith("with_indices") and node.args[1] == 1
        return ANY if indices else found.get(source, ANY)
    name, args = name_of(node.target), arguments(node)
    if not args:
        return ANY  # a number
    clamp = clamp_of(node)
    if clamp is not None:
        low, high = found[node.all_input_nodes[0]]
        return (min(max(low, clamp[0]), clamp[1]), min(max(high, clamp[0]), clamp[1]))
    if name in _FIXED:
        return _FIXED[name]
    if name in _ARITHMETIC and not set(node.kwargs) - {"alpha"}:
        return _ARITHMETIC[name](_of(args["self"], found), _of(args["other"], found), args.get("alpha", 1))
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if name in ("cat", "concat", "stack"):
        parts = [found.get(n, ANY) for n in args["tensors"]]
        return (min(p[0] for p in parts), max(p[1] for p in parts))
    if name in ("pad", "constant_pad_nd") and first is not None:
        value = args.get("value") or 0.0
        low, high = found[first]
        return (min(low, value), max(high, value)) if args.get("mode", "constant") == "constant" else ANY
    if first is None:
        return ANY
    if name.startswith(_SAME) or ops.kind_of(node.target) is Kind.STRUCTURAL:
        return found[first]
    if name.startswith(_AVERAGES):
        return (0.0, math.inf) if found[first][0] >= 0 else ANY
    return ANY


def _of(value: Any, found: dict[fx.Node, Range]) -> Range:
    if isinstance(value, fx.Node):
        return found.get(value, ANY)
    return (float(value), float(value)) if isinstance(value, (int, float)) else ANY


def _add(a: Range, b: Range, alpha: Any) -> Range:
    scaled = _mul(b, _of(alpha, {}), 1)
    low, high = a[0] + scaled[0], a[1] + scaled[1]
    if alpha in (1, -1):
        return (_rounded(low), _rounded(high))
    return (0.0 if a[0] >= 0 and scaled[0] >= 0 else -math.inf, math.inf)  # rounded twice, or once, as it comes


def _mul(a: Range, b: Range, _: Any) -> Range:
    corners = [x * y if x and y else 0.0 for x in a for y in b]  # an unbounded value is still a finite one
    return (_rounded(min(corners)), _rounded(max(corners)))


def _rounded(value: float) -> float:
    """As single precision rounds it: rounding is monotone, so it is the bound of all rounded results."""
    return float(np.float32(value))


_ARITHMETIC: dict[str, Callable[[Range, Range, Any], Range]] = {"add": _add, "mul": _mul}
