"""What TorchScript code may call besides its own functions: arithmetic on numbers and lists, allowed ATen operators.

The serialised code spells everything as ``torch.<name>`` or ``ops.prim.<name>``, be it a tensor operator, arithmetic on
sizes or a list method. ``call_torch`` tells them apart by what the arguments are. Traced code wraps sizes in tensors
(``ops.prim.NumToTensor``); here they stay numbers, so that they stay dynamic. Results are bounded: no number beyond 64
bits, no list or text of absurd length.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from edgeprune.errors import ModelFileError, UnsupportedModelError
from edgeprune.graph.operators import aten_packet
from edgeprune.graph.trace import refuse_unwieldy

_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_MAX_LIST, _MAX_TEXT, _MAX_LEAVES = 1_000, 4_000, 10_000


def call_torch(name: str, args: list[Any], kwargs: dict[str, Any], scalars: Mapping[int, Any], origin: str) -> Any:
    """``torch.<name>(*args, **kwargs)``.

    scalars: id of a constant tensor with one integer -> its value, for arithmetic of sizes with such constants
    """
    if args and isinstance(args[0], torch.Tensor) and name in _TENSOR_FACTS:
        return _TENSOR_FACTS[name](*args)
    if args and isinstance(args[0], (list, tuple, dict, str)) and name in _CONTAINERS:
        return _bounded(_CONTAINERS[name](*args))
    if name in _ANYTHING:
        return _ANYTHING[name](*args)
    if name in _ARITHMETIC and not kwargs:
        plain = [scalars.get(id(a), a) if isinstance(a, torch.Tensor) else a for a in args]
        if all(isinstance(a, _NUMBERS) or a is None for a in plain) and not all(
            isinstance(a, torch.Tensor) for a in args
        ):
            return _bounded(_ARITHMETIC[name](*plain))
    if name in _KEEPS_NUMBER and args and isinstance(args[0], _NUMBERS):
        return args[0]
    if name == "tensor":
        return _tensor(args[0], args[1] if len(args) > 1 else kwargs.get("dtype"))
    if name in ("_convolution", "convolution"):
        return _convolution(args, origin)
    leaves(args)
    packet = aten_packet(name, origin)
    try:
        return packet(*args, **{k: _on_cpu(v) for k, v in kwargs.items()})
    except RuntimeError as error:
        if "failed to match any schema" not in str(error):
            raise
        kinds = ", ".join(type(a).__name__ for a in args)
        raise UnsupportedModelError(
            f"{origin}: the code calls aten::{name} with ({kinds}), which fits no overload"
        ) from error


def call_prim(name: str, args: list[Any], origin: str) -> Any:
    """``ops.prim.<name>(*args)``."""
    if name == "RaiseException":
        raise UnsupportedModelError(f"{origin}: the model itself refuses this input: {str(args[0])[:200]}")
    if name not in _PRIM:
        raise UnsupportedModelError(f"{origin}: TorchScript operator prim::{name[:60]} is not supported")
    return _bounded(_PRIM[name](*args))


def to_int(value: Any) -> Any:
    return value if isinstance(value, torch.SymInt) else int(value)


def to_float(value: Any) -> Any:
    return value if isinstance(value, torch.SymFloat) else torch.sym_float(value)


def to_bool(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        raise ModelFileError("the control flow of the model depends on values of tensors, not only on shapes")
    return bool(value)


def leaves(value: Any) -> list[Any]:
    """What lies in nested lists, tuples and dicts. Lists that hold one another a thousandfold are refused."""
    found: list[Any] = []
    stack, visited = [value], 0
    while stack:
        top = stack.pop()
        visited += 1
        if visited > _MAX_LEAVES:
            raise ModelFileError("a list in the code grows beyond all bounds")
        if isinstance(top, dict):
            top = list(top.values())
        if isinstance(top, (list, tuple)):
            stack.extend(reversed(top))
        else:
            found.append(top)
    return found


def _bounded(value: Any) -> Any:
    refuse_unwieldy(value)
    if type(value) is int and abs(value) >= 1 << 63:
        raise ModelFileError("a number in the code leaves 64 bits")
    if isinstance(value, (list, tuple)) and len(value) > _MAX_LIST:
        raise ModelFileError("a list in the code grows beyond all bounds")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        return value[:_MAX_TEXT]
    return value


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _tensor(value: Any, dtype: Any) -> torch.Tensor:
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return torch.ops.aten.scalar_tensor(value, dtype=dtype)
    flat = [value]
    while flat and isinstance(flat[0], (list, tuple)):
        flat = [v for part in flat for v in part]
    if not all(type(v) in (int, float, bool) for v in flat):
        raise ModelFileError("a tensor is made of something other than numbers")
    made = torch.tensor(value)
    return made if dtype is None else torch.ops.aten.to(made, dtype)


def _convolution(args: list[Any], origin: str) -> Any:
    """The form that tracing records -> the public operator, which export and lift know."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    rank = len(stride)
    if transposed:
        packet = aten_packet(f"conv_transpose{rank}d", origin)
        return packet(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return aten_packet(f"conv{rank}d", origin)(x, weight, bias, stride, padding, dilation, groups)


def _power(base: Any, exponent: Any) -> Any:
    if type(base) is int and type(exponent) is int and not (0 <= exponent <= 64):
        return float(base) ** exponent
    return base**exponent


def _format(template: Any, *args: Any) -> str:
    text = str(template)[:_MAX_TEXT]
    for arg in args:
        shown = str(arg)[:200] if isinstance(arg, (*_NUMBERS, str)) else f"<{type(arg).__name__}>"
        text = text.replace("{}", shown, 1)
    return text


def _repeat(value: Any, count: Any) -> Any:
    if isinstance(value, str) or len(value) * int(count) > _MAX_LIST:
        raise ModelFileError("a list in the code grows beyond all bounds")
    return value * int(count)


def _insert(values: list[Any], index: int, value: Any) -> list[Any]:
    values.insert(index, value)
    return values


def _append(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return _bounded(values)


def _extend(values: list[Any], more: list[Any]) -> list[Any]:
    if len(values) + len(more) > _MAX_LIST:
        raise ModelFileError("a list in the code grows beyond all bounds")
    values.extend(more)
    return values


def _size(x: torch.Tensor, dim: int | None = None) -> Any:
    return list(x.shape) if dim is None else x.shape[dim]


def _set_item(container: Any, key: Any, value: Any) -> Any:
    container[key] = value
    return container


def _same(a: Any, b: Any) -> bool:
    if len(leaves(a)) != len(leaves(b)):
        return False
    return bool(a == b)


def _cut(values: Any, start: Any = None, end: Any = None, step: Any = None) -> Any:
    return values[start:end:step]


def _extreme(pick: Callable[..., Any], symbolic: Callable[..., Any], *args: Any) -> Any:
    if len(args) == 1:
        return pick(args[0])
    if len(args) == 2 and all(isinstance(a, _NUMBERS) for a in args):
        return symbolic(*args)
    return pick(*args)


def _max(*args: Any) -> Any:
    return _extreme(max, torch.sym_max, *args)


def _min(*args: Any) -> Any:
    return _extreme(min, torch.sym_min, *args)


def _clamp(value: Any, low: Any = None, high: Any = None) -> Any:
    value = value if low is None else _max(value, low)
    return value if high is None else _min(value, high)


_TENSOR_FACTS: dict[str, Callable[..., Any]] = {
    "size": _size,
    "dim": lambda x: x.dim(),
    "numel": lambda x: x.numel(),
    "len": lambda x: x.shape[0],
    "is_floating_point": lambda x: x.is_floating_point(),
    "is_complex": lambda x: x.is_complex(),
    "is_contiguous": lambda x, *_: True,
    "stride": lambda x, *dim: x.stride(*dim),
    "get_device": lambda x: -1,
    "requires_grad_": lambda x, *_: x,
}
_CONTAINERS: dict[str, Callable[..., Any]] = {
    "len": len,
    "append": _append,
    "extend": _extend,
    "insert": _insert,
    "pop": lambda values, index=-1: values.pop(index),
    "list": list,
    "copy": list,
    "reverse": lambda values: values.reverse(),
    "slice": _cut,
    "add": lambda a, b: [*a, *b] if not isinstance(a, str) else _format("{}{}", a, b),
    "add_": _extend,
    "mul": _repeat,
    "__getitem__": operator.getitem,
    "_set_item": _set_item,
    "__contains__": lambda values, value: any(_same(v, value) for v in values),
    "keys": lambda values: list(values.keys()),
    "values": lambda values: list(values.values()),
    "items": lambda values: list(values.items()),
    "get": lambda values, *args: values.get(*args),
    "eq": lambda a, b: _same(a, b),
    "ne": lambda a, b: not _same(a, b),
    "lower": lambda text: text.lower(),
    "format": _format,
    "numel": lambda values: len(values),
}
_ANYTHING: dict[str, Callable[..., Any]] = {
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__not__": lambda value: not to_bool(value),
    "warn": lambda *_: None,
    "manual_seed": lambda *_: None,
    "format": _format,
    "device": lambda *_: torch.device("cpu"),
    "is_grad_enabled": lambda: False,
    "is_scripting": lambda: True,
    "is_tracing": lambda: False,
    "is_autocast_enabled": lambda *_: False,
    "IntImplicit": to_int,
    "FloatImplicit": to_float,
    "ScalarImplicit": lambda value: value,
    "_unwrap_optional": lambda value: value,
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, alpha=1: a + b * alpha,
    "sub": lambda a, b, alpha=1: a - b * alpha,
    "rsub": lambda a, b, alpha=1: b - a * alpha,
    "mul": operator.mul,
    "div": lambda a, b, rounding=None: a / b if rounding is None else a // b,
    "true_divide": operator.truediv,
    "floordiv": operator.floordiv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "mod": operator.mod,
    "fmod": operator.mod,
    "pow": _power,
    "neg": operator.neg,
    "abs": abs,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "__and__": lambda a, b: a and b if isinstance(a, bool) else a & b,
    "__or__": lambda a, b: a or b if isinstance(a, bool) else a | b,
    "__xor__": operator.xor,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "trunc": math.trunc,
    "sqrt": lambda a: torch.sym_sqrt(a) if isinstance(a, (torch.SymInt, torch.SymFloat)) else math.sqrt(a),
    "log": math.log,
    "exp": math.exp,
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "clamp_min": lambda a, low: _clamp(a, low),
    "clamp_max": lambda a, high: _clamp(a, None, high),
    "maximum": _max,
    "minimum": _min,
    "Int": to_int,
    "Float": to_float,
    "Bool": to_bool,
    "str": lambda value: str(value),
}
_KEEPS_NUMBER = frozenset(
    ("to", "detach", "clone", "contiguous", "type_as", "lift_fresh", "squeeze", "unsqueeze", "item", "cpu")
)
_PRIM: dict[str, Callable[..., Any]] = {
    "NumToTensor": lambda value: value,
    "ImplicitTensorToNum": lambda value: value,
    "unchecked_unwrap_optional": lambda value: value,
    "unchecked_cast": lambda value: value,
    "data": lambda x: x.detach(),
    "device": lambda x: torch.device("cpu"),
    "dtype": lambda x: x.dtype,
    "layout": lambda x: torch.strided,
    "is_cuda": lambda x: False,
    "is_mkldnn": lambda x: False,
    "is_quantized": lambda x: False,
    "is_sparse": lambda x: False,
    "requires_grad": lambda x: False,
    "min": _min,
    "max": _max,
    "abs": abs,
    "Print": lambda *_: None,
    "shape": lambda x: list(x.shape),
    "tolist": lambda value, *_: value,
    "ModuleContainerIndex": operator.getitem,
}
