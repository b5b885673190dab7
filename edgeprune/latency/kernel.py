"""Kernel: one fused operation as the target runs it, the unit that is measured. Site: its place in one network.

A kernel says everything that decides its time and nothing else: two layers with equal kernels share one row of the
table. Its text key is stable and readable:

    Conv{group=1;kernel_shape=3x3;pads=1x1x1x1;strides=1x1} 1x64x28x28 1x96x28x28 > 1x96x28x28 +Add+Relu f32
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from edgeprune.errors import TableError

Shape = tuple[int, ...]

_KEY = re.compile(
    r"(?P<op>[\w.:]+)\{(?P<attrs>[^{} ]*)\}(?P<inputs>( [\dx.]+)*) > (?P<output>[\dx.]+)"
    r"(?P<tail>( \+[\w+]+)?) (?P<dtype>\w+)"
)


@dataclass(frozen=True, slots=True, order=True)
class Kernel:
    """One fused kernel at batch 1.

    op:     ONNX operator of the anchor, e.g. "Conv" ("domain::Op" outside the ONNX domain)
    attrs:  what else decides the time, sorted by name; values as text. A convolution's ``group`` is "dw" when
            every input channel is a group of its own, so that the key does not change its class with the width.
            ``io`` names the tensor layouts around the kernel where they are not the blocked default (fusion.py).
    inputs: shapes of the activation inputs; weights follow from them, from ``output`` and from ``attrs``
    output: shape of the first output, after the tail
    tail:   operators fused into the anchor, in order, e.g. ("Add", "Relu")
    """

    op: str
    attrs: tuple[tuple[str, str], ...]
    inputs: tuple[Shape, ...]
    output: Shape
    tail: tuple[str, ...] = ()
    dtype: str = "f32"

    def attr(self, name: str, default: str = "") -> str:
        return dict(self.attrs).get(name, default)

    def with_attrs(self, **attrs: str) -> Kernel:
        """The same kernel with some attributes set; an empty value removes the attribute."""
        merged = {**dict(self.attrs), **attrs}
        return replace(self, attrs=tuple(sorted((k, v) for k, v in merged.items() if v != "")))

    def key(self) -> str:
        attrs = ";".join(f"{quote(name, safe='')}={quote(value, safe=':|,>')}" for name, value in self.attrs)
        inputs = "".join(f" {shape_text(shape)}" for shape in self.inputs)
        tail = " +" + "+".join(self.tail) if self.tail else ""
        return f"{self.op}{{{attrs}}}{inputs} > {shape_text(self.output)}{tail} {self.dtype}"

    @staticmethod
    def from_key(text: str) -> Kernel:
        """Inverse of ``key``. Raises TableError when the text is no key."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise TableError(f"not a kernel key: {text[:120]!r}; expected what Kernel.key() writes")
        pairs = [pair.partition("=") for pair in match["attrs"].split(";") if pair]
        return Kernel(
            op=match["op"],
            attrs=tuple((unquote(name), unquote(value)) for name, _, value in pairs),
            inputs=tuple(parse_shape(shape) for shape in match["inputs"].split()),
            output=parse_shape(match["output"]),
            tail=tuple(match["tail"].strip(" +").split("+")) if match["tail"] else (),
            dtype=match["dtype"],
        )


@dataclass(frozen=True, slots=True)
class Site:
    """A kernel at its place in one network.

    name:          name of the anchor node
    nodes:         names of the nodes it covers, the anchor first
    inputs:        tensor names, one per shape of ``kernel.inputs``
    output:        tensor name of the kernel's (first) output, after the tail
    anchor_output: tensor name of the anchor's own output
    """

    kernel: Kernel
    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    anchor_output: str


def multiply_adds(kernel: Kernel) -> int:
    """Multiply-accumulates of a convolution or matrix product, 0 of anything else, as papers count. They say nothing
    about its latency."""
    if not kernel.inputs:
        return 0
    first = kernel.inputs[0]
    if kernel.op in ("Conv", "ConvTranspose"):
        group = kernel.attr("group", "1")
        per_group = 1 if group == "dw" else first[1] // int(group)
        taps = math.prod(int(v) for v in re.split("[x,]", kernel.attr("kernel_shape")))
        if kernel.op == "Conv":
            return math.prod(kernel.output) * per_group * taps
        return math.prod(first) * (kernel.output[1] * per_group // first[1]) * taps
    if kernel.op == "Gemm":
        return math.prod(kernel.output) * (first[0] if kernel.attr("transA", "0") == "1" else first[-1])
    if kernel.op == "MatMul":
        return math.prod(kernel.output) * (first[-2] if kernel.attr("c0") and len(first) > 1 else first[-1])
    return 0


def shape_text(shape: Shape) -> str:
    """(1, 64, 28, 28) -> "1x64x28x28"; a scalar's () -> "."."""
    return "x".join(str(dim) for dim in shape) if shape else "."


def parse_shape(text: str) -> Shape:
    """Inverse of ``shape_text``."""
    return () if text == "." else tuple(int(dim) for dim in text.split("x"))
