"""Numbers, lists and texts as TorchScript code handles them: bounded, and symbolic where sizes are.

The tables at the end say what every name does to what kind of argument. No number leaves 64 bits, no list or text grows
to absurd length, and nested lists are never walked without counting.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from edgeprune.errors import ModelFileError
from edgeprune.graph.trace import refuse_unwieldy

NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_MAX_LIST, _MAX_TEXT, _MAX_LEAVES = 1_000, 4_000, 10_000


def to_int(value: Any) -> Any:
    return value if isinstance(value, torch.SymInt) else int(value)


def to_float(value: Any) -> Any:
    return value if isinstance(value, torch.SymFloat) else torch.sym_float(value)


def to_bool(value: Any) -> bool:
    """Raises ModelFileError for a tensor: a branch on values is not known until the network runs."""
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


def bounded(value: Any) -> Any:
    """The value, unless it is absurdly large: ModelFileError."""
    refuse_unwieldy(value)
    if type(value) is int and abs(value) >= 1 << 63:
        raise ModelFileError("a number in the code leaves 64 bits")
    if isinstance(value, (list, tuple)) and len(value) > _MAX_LIST:
        raise ModelFileError("a list in the code grows beyond all bounds")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        return value[:_MAX_TEXT]
    return value


def _power(base: Any, exponent: Any) -> Any:
    if type(base) is int and type(exponent) is int and not (0 <= exponent <= 64):
        return float(base) ** exponent
    return base**exponent


def _format(template: Any, *args: Any) -> str:
    text = str(template)[:_MAX_TEXT]
    for arg in args:
        shown = str(arg)[:200] if isinstance(arg, (*NUMBERS, str)) else f"<{type(arg).__name__}>"
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
    return bounded(values)


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
    if len(args) == 2 and all(isinstance(a, NUMBERS) for a in args):
        return symbolic(*args)
    return pick(*args)


def _max(*args: Any) -> Any:
    return _extreme(max, torch.sym_max, *args)


def _min(*args: Any) -> Any:
    return _extreme(min, torch.sym_min, *args)


def _clamp(value: Any, low: Any = None, high: Any = None) -> Any:
    value = value if low is None else _max(value, low)
    return value if high is None else _min(value, high)


TENSOR_FACTS: dict[str, Callable[..., Any]] = {
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
CONTAINERS: dict[str, Callable[..., Any]] = {
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
ANYTHING: dict[str, Callable[..., Any]] = {
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
ARITHMETIC: dict[str, Callable[..., Any]] = {
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
KEEPS_NUMBER = frozenset(
    ("to", "detach", "clone", "contiguous", "type_as", "lift_fresh", "squeeze", "unsqueeze", "item", "cpu")
)
PRIM: dict[str, Callable[..., Any]] = {
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
