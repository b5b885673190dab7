"""ATen calls on weight tensors become modules again: which calls, and how the module is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from edgeprune.graph.network import BATCH_NORMS, CONV_TRANSPOSES, CONVS

aten = torch.ops.aten

_CONVS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
_CONVS_PADDING = {aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}
_TRANSPOSES = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}
WEIGHTED = {*_CONVS, *_CONVS_PADDING, *_TRANSPOSES, aten.convolution.default, aten.linear.default}
DECOMPOSED_NORM = aten._native_batch_norm_legit_no_training.default  # returns (output, mean, rstd)
NORMS = {aten.batch_norm.default, DECOMPOSED_NORM}
DROPOUTS: dict[Any, type[nn.Module]] = {
    aten.dropout.default: nn.Dropout,
    aten.dropout_.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.feature_dropout_.default: nn.Dropout2d,
}


def bound(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    values = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    values.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
    values.update(node.kwargs)
    return values


def weighted(
    target: Any, args: dict[str, Any], weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[nn.Module, tuple[Any, ...]]:
    """The convolution or linear that a call (target in WEIGHTED) is, and a key that equal geometry shares."""
    module, key = _empty(target, args, weight, bias is not None)
    module.weight = parameter(weight)
    if bias is not None:
        module.bias = parameter(bias)
    return module, key


def _empty(target: Any, args: dict[str, Any], weight: torch.Tensor, bias: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    if target is aten.linear.default:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta"), ("linear",)
    groups, size = args["groups"], tuple(weight.shape[2:])
    rank = len(size)
    kind: Any
    if target in _TRANSPOSES or args.get("transposed"):
        geometry = {k: _spread(args[k], rank) for k in ("stride", "padding", "output_padding", "dilation")}
        kind = CONV_TRANSPOSES[rank - 1]
        module = kind(
            weight.shape[0], weight.shape[1] * groups, size, groups=groups, bias=bias, device="meta", **geometry
        )
        return module, ("transpose", groups, *geometry.values())
    padding = args["padding"] if isinstance(args["padding"], str) else _spread(args["padding"], rank)
    stride, dilation = _spread(args["stride"], rank), _spread(args["dilation"], rank)
    kind = CONVS[rank - 1]
    module = kind(
        weight.shape[1] * groups, weight.shape[0], size, stride=stride, padding=padding, dilation=dilation,
        groups=groups, bias=bias, device="meta",
    )  # fmt: skip
    return module, ("conv", groups, stride, padding, dilation)


def norm(
    rank: int, args: dict[str, Any], mean: torch.Tensor, var: torch.Tensor,
    weight: torch.Tensor | None, bias: torch.Tensor | None,
) -> nn.Module:  # fmt: skip
    """The batch norm over tensors of ``rank`` dimensions with these running statistics."""
    module: Any = BATCH_NORMS[max(rank, 3) - 3](
        mean.shape[0], eps=args["eps"], momentum=args["momentum"], affine=False, device="meta"
    )
    module.running_mean, module.running_var = mean.detach(), var.detach()
    module.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    module.affine = True
    module.weight = parameter(weight if weight is not None else torch.ones_like(mean))
    module.bias = parameter(bias if bias is not None else torch.zeros_like(mean))
    return module


def as_linear(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """(input, weight, bias) of an ``addmm`` or ``mm`` that decomposing made of a linear, else None."""
    if node.target is aten.addmm.default and not node.kwargs and len(node.args) == 3:
        bias, x, turned = node.args
    elif node.target is aten.mm.default:
        bias, (x, turned) = None, node.args
    else:
        return None
    if not isinstance(turned, fx.Node) or turned.op != "call_function":
        return None
    if turned.target is aten.t.default or (turned.target is aten.permute.default and list(turned.args[1]) == [1, 0]):  # type: ignore[arg-type]
        return x, turned.args[0], bias
    return None


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=True)


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))
