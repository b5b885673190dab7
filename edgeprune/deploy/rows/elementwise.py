"""Rows for operators that work on each element: arithmetic, activations, comparisons, casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from edgeprune.deploy.emit import DTYPES, Arguments, Call, Edge

Row = Callable[[Call, Arguments], Any]


def unary(op: str, **attributes: Any) -> Row:
    """An ONNX operator of one input, cast to the result's dtype before (torch promotes integers)."""

    def row(call: Call, a: Arguments) -> Edge:
        dtype = call.meta.dtype if call.meta.dtype != torch.bool else None
        return call.out(op, call.tensor(a.self, dtype), **attributes)

    return row


def binary(op: str) -> Row:
    """Arithmetic on ``self`` and ``other``; ``alpha``, where the operator has it, multiplies ``other``."""

    def row(call: Call, a: Arguments) -> Edge:
        dtype = call.meta.dtype
        other = a.other
        alpha = getattr(a, "alpha", 1)
        if alpha != 1:
            scaled = isinstance(other, (int, float))
            other = other * alpha if scaled else call.add("Mul", call.tensor(other, dtype), call.scalar(alpha, dtype))
        return call.out(op, call.tensor(a.self, dtype), call.tensor(other, dtype))

    return row


def rsub(call: Call, a: Arguments) -> Edge:
    return binary("Sub")(call, Arguments(self=a.other, other=a.self, alpha=a.alpha))


def compare(op: str, negate: bool = False) -> Row:
    def row(call: Call, a: Arguments) -> Edge:
        left, right = (v.meta if isinstance(v, Edge) else v for v in (a.self, a.other))
        dtype = torch.result_type(left, right)
        pair = call.tensor(a.self, dtype), call.tensor(a.other, dtype)
        return call.out("Not", call.add(op, *pair)) if negate else call.out(op, *pair)

    return row


def logical(op: str) -> Row:
    def row(call: Call, a: Arguments) -> Edge:
        return call.out(op, call.tensor(a.self, torch.bool), call.tensor(a.other, torch.bool))

    return row


def div(call: Call, a: Arguments) -> Edge:
    mode = getattr(a, "rounding_mode", None)
    dtype = call.meta.dtype
    pair = call.tensor(a.self, dtype), call.tensor(a.other, dtype)
    if mode is None:
        return call.out("Div", *pair)
    if not dtype.is_floating_point:
        raise call.refuse("integer division of a computed tensor is not supported")
    if mode == "floor":
        return call.out("Floor", call.add("Div", *pair))
    quotient = call.add("Div", *pair)
    return call.out("Mul", call.add("Sign", quotient), call.add("Floor", call.add("Abs", quotient)))


def floor_divide(call: Call, a: Arguments) -> Edge:
    return div(call, Arguments(self=a.self, other=a.other, rounding_mode="floor"))


def remainder(call: Call, a: Arguments) -> Edge:
    dtype = call.meta.dtype
    left, right = call.tensor(a.self, dtype), call.tensor(a.other, dtype)
    whole = call.add("Floor", call.add("Div", left, right))
    return call.out("Sub", left, call.add("Mul", whole, right))


def power(call: Call, a: Arguments) -> Edge:
    base, exponent, dtype = a.self, a.exponent, call.meta.dtype
    if isinstance(exponent, (int, float)):
        x = call.tensor(base, dtype)
        if exponent == 2:
            return call.out("Mul", x, x)
        if exponent == 3:
            return call.out("Mul", call.add("Mul", x, x), x)
        if exponent == 0.5:
            return call.out("Sqrt", x)
        if exponent == -1:
            return call.out("Reciprocal", x)
        if exponent == -0.5:
            return call.out("Reciprocal", call.add("Sqrt", x))
    return call.out("Pow", call.tensor(base, dtype), call.tensor(exponent, dtype))


def relu(call: Call, a: Arguments) -> Edge:
    return call.out("Relu", a.self)


def clip(low: str | float | None, high: str | float | None) -> Row:
    """Clip; a bound is a number, the name of an argument, or None."""

    def bound(call: Call, a: Arguments, value: str | float | None) -> Any:
        return getattr(a, value) if isinstance(value, str) else value

    def row(call: Call, a: Arguments) -> Any:
        least, most = bound(call, a, low), bound(call, a, high)
        dtype = call.meta.dtype
        if isinstance(least, (torch.Tensor, Edge)) or isinstance(most, (torch.Tensor, Edge)):
            x = call.tensor(a.self, dtype)
            if least is None:
                return call.out("Min", x, call.tensor(most, dtype))
            if most is None:
                return call.out("Max", x, call.tensor(least, dtype))
            return call.out("Min", call.add("Max", x, call.tensor(least, dtype)), call.tensor(most, dtype))
        least = None if least == -math.inf else least
        most = None if most == math.inf else most
        if least is None and most is None:
            return a.self
        x = call.tensor(a.self, dtype)
        if least == 0 and most is None and dtype.is_floating_point:
            return call.out("Relu", x)
        ends = ("" if v is None else call.scalar(v, dtype) for v in (least, most))
        return call.out("Clip", x, *ends)

    return row


def leaky_relu(call: Call, a: Arguments) -> Edge:
    return call.out("LeakyRelu", a.self, alpha=float(a.negative_slope))


def rrelu(call: Call, a: Arguments) -> Edge:
    if a.training:
        raise call.refuse("it is in training mode")
    return call.out("LeakyRelu", a.self, alpha=(float(a.lower) + float(a.upper)) / 2)


def prelu(call: Call, a: Arguments) -> Edge:
    slope = a.weight
    if isinstance(slope, torch.Tensor) and slope.numel() == 1:
        return call.out("LeakyRelu", a.self, alpha=float(slope))  # a runtime fuses it into a convolution
    if not isinstance(slope, torch.Tensor):
        raise call.refuse("its slope is computed while the network runs")
    shaped = slope.detach().reshape(-1, *[1] * max(a.self.rank - 2, 0))
    if id(slope) in call.emitter.names:
        call.emitter.names[id(shaped)] = call.emitter.names[id(slope)]
    return call.out("PRelu", a.self, shaped)


def elu(call: Call, a: Arguments) -> Edge:
    if a.scale != 1 or a.input_scale != 1:
        raise call.refuse("elu with a scale is not supported")
    return call.out("Elu", a.self, alpha=float(a.alpha))


def celu(call: Call, a: Arguments) -> Edge:
    return call.out("Celu", a.self, alpha=float(a.alpha))


def silu(call: Call, a: Arguments) -> Edge:
    return call.out("Mul", a.self, call.add("Sigmoid", a.self))


def mish(call: Call, a: Arguments) -> Edge:
    return call.out("Mul", a.self, call.add("Tanh", call.add("Softplus", a.self)))


def hardsigmoid(call: Call, a: Arguments) -> Edge:
    return call.out("HardSigmoid", a.self, alpha=1 / 6, beta=0.5)


def softplus(call: Call, a: Arguments) -> Edge:
    """Beyond ``threshold`` torch gives x itself, which softplus equals there to float rounding."""
    if a.beta == 1:
        return call.out("Softplus", a.self)
    beta = call.scalar(float(a.beta), call.meta.dtype)
    return call.out("Div", call.add("Softplus", call.add("Mul", a.self, beta)), beta)


def log_sigmoid(call: Call, a: Arguments) -> Edge:
    return call.out("Neg", call.add("Softplus", call.add("Neg", a.self)))


def gelu(call: Call, a: Arguments) -> Edge:
    """ONNX has Gelu from opset 20 on; runtimes recognise these forms and fuse them."""
    x, dtype = a.self, call.meta.dtype

    def number(value: float) -> str:
        return call.scalar(value, dtype)

    if a.approximate == "tanh":
        cube = call.add("Mul", call.add("Mul", x, x, label="square"), x, label="cube")
        inner = call.add("Add", x, call.add("Mul", cube, number(0.044715), label="cubic"))
        tanh = call.add("Tanh", call.add("Mul", inner, number(math.sqrt(2 / math.pi)), label="inner"))
        return call.out(
            "Mul", call.add("Mul", x, number(0.5), label="half"), call.add("Add", tanh, number(1), label="one")
        )
    erf = call.add("Erf", call.add("Div", x, number(math.sqrt(2))))
    return call.out("Mul", call.add("Mul", x, call.add("Add", erf, number(1.0))), number(0.5))


def glu(call: Call, a: Arguments) -> Edge:
    half = call.emitter.fresh(f"{call.name}.value"), call.emitter.fresh(f"{call.name}.gate")
    call.emitter.node("Split", [call.tensor(a.self)], half, f"{call.label}.split", {"axis": a.dim % a.self.rank})
    return call.out("Mul", half[0], call.add("Sigmoid", half[1]))


def threshold(call: Call, a: Arguments) -> Edge:
    dtype = call.meta.dtype
    above = call.add("Greater", a.self, call.scalar(a.threshold, dtype))
    return call.out("Where", above, a.self, call.scalar(a.value, dtype))


def log1p(call: Call, a: Arguments) -> Edge:
    return call.out("Log", call.add("Add", a.self, call.scalar(1, call.meta.dtype)))


def expm1(call: Call, a: Arguments) -> Edge:
    return call.out("Sub", call.add("Exp", a.self), call.scalar(1, call.meta.dtype))


def rsqrt(call: Call, a: Arguments) -> Edge:
    return call.out("Reciprocal", call.add("Sqrt", a.self))


def square(call: Call, a: Arguments) -> Edge:
    return call.out("Mul", a.self, a.self)


def where(call: Call, a: Arguments) -> Edge:
    dtype = call.meta.dtype
    return call.out(
        "Where", call.tensor(a.condition, torch.bool), call.tensor(a.self, dtype), call.tensor(a.other, dtype)
    )


def masked_fill(call: Call, a: Arguments) -> Edge:
    dtype = call.meta.dtype
    return call.out("Where", call.tensor(a.mask, torch.bool), call.tensor(a.value, dtype), call.tensor(a.self, dtype))


def addcmul(call: Call, a: Arguments) -> Edge:
    product = call.add("Mul", a.tensor1, a.tensor2)
    if a.value != 1:
        product = call.add("Mul", product, call.scalar(a.value, call.meta.dtype), label="scaled")
    return call.out("Add", a.self, product)


def lerp(call: Call, a: Arguments) -> Edge:
    step = call.add("Mul", call.add("Sub", a.end, a.self), call.tensor(a.weight, call.meta.dtype))
    return call.out("Add", a.self, step)


def cast(call: Call, a: Arguments) -> Any:
    """To another dtype; to the same, or to another device or layout, is nothing."""
    source = getattr(a, "self", None)
    if isinstance(source, Edge) and source.dtype == call.meta.dtype:
        return source
    return call.out("Cast", source, to=DTYPES[call.meta.dtype])


def dropout(call: Call, a: Arguments) -> Any:
    if a.train:
        raise call.refuse("it is in training mode; call eval() first")
    return a.input


def logical_not(call: Call, a: Arguments) -> Edge:
    return call.out("Not", call.tensor(a.self, torch.bool))


def nothing(call: Call, a: Arguments) -> Any:
    """Gives back what it got (contiguous, clone, dropout in evaluation mode, ...)."""
    return getattr(a, "self", None) if hasattr(a, "self") else a.input


def filled(value: float | str) -> Row:
    """zeros_like and its kin: a constant, since the shape is one. A string names the argument with the value."""

    def row(call: Call, a: Arguments) -> torch.Tensor:
        content = getattr(a, value) if isinstance(value, str) else value
        return torch.full(tuple(call.meta.shape), content, dtype=call.meta.dtype)

    return row
