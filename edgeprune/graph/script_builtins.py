"""What TorchScript code may call besides its own functions: arithmetic on numbers and lists, allowed ATen operators.

The serialised code spells everything as ``torch.<name>`` or ``ops.prim.<name>``, be it a tensor operator, arithmetic on
sizes or a list method. ``call_torch`` tells them apart by what the arguments are. Traced code wraps sizes in tensors
(``ops.prim.NumToTensor``); here they stay numbers, so that they stay dynamic (script_values.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgeprune.errors import ModelFileError, UnsupportedModelError
from edgeprune.graph.operators import aten_packet
from edgeprune.graph.script_values import (
    ANYTHING,
    ARITHMETIC,
    CONTAINERS,
    KEEPS_NUMBER,
    NUMBERS,
    PRIM,
    TENSOR_FACTS,
    bounded,
    leaves,
)


def call_torch(name: str, args: list[Any], kwargs: dict[str, Any], scalars: Mapping[int, Any], origin: str) -> Any:
    """``torch.<name>(*args, **kwargs)``.

    scalars: id of a constant tensor with one integer -> its value, for arithmetic of sizes with such constants
    """
    if args and isinstance(args[0], torch.Tensor) and name in TENSOR_FACTS:
        return TENSOR_FACTS[name](*args)
    if args and isinstance(args[0], (list, tuple, dict, str)) and name in CONTAINERS:
        return bounded(CONTAINERS[name](*args))
    if name in ANYTHING:
        return ANYTHING[name](*args)
    if name in ARITHMETIC and not kwargs:
        plain = [scalars.get(id(a), a) if isinstance(a, torch.Tensor) else a for a in args]
        if all(isinstance(a, NUMBERS) or a is None for a in plain) and not all(
            isinstance(a, torch.Tensor) for a in args
        ):
            return bounded(ARITHMETIC[name](*plain))
    if name in KEEPS_NUMBER and args and isinstance(args[0], NUMBERS):
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
    if name not in PRIM:
        raise UnsupportedModelError(f"{origin}: TorchScript operator prim::{name[:60]} is not supported")
    return bounded(PRIM[name](*args))


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
