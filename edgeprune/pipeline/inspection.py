"""The three views of a network in one table: its layers, the channel groups they read and write, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeprune.latency.kernel import Kernel
from edgeprune.pipeline.spans import Anatomy, Span
from edgeprune.plan.problem import Axis


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel: what it covers, the groups its channel counts depend on, its latency in ms and share in 0..1."""

    name: str
    nodes: tuple[str, ...]
    kernel: str
    channels: tuple[str, ...]
    block: str | None
    latency_ms: float
    share: float


@dataclass(frozen=True, slots=True)
class Inspection:
    origin: str
    latency_ms: float
    rows: tuple[Row, ...]
    groups: tuple[dict[str, Any], ...]
    blocks: tuple[str, ...]
    frozen: tuple[str, ...]

    @staticmethod
    def of(anatomy: Anatomy, latency_ms: float, kernel_ms: Callable[[Kernel], float]) -> Inspection:
        """latency_ms: of the whole network, measured; the kernels' shares are of their own sum."""
        costs = [kernel_ms(span.site.kernel) for span in anatomy.spans]
        total = sum(costs) or 1.0
        rows = tuple(
            _row(anatomy, span, cost, cost / total) for span, cost in zip(anatomy.spans, costs, strict=True)
        )  # fmt: skip
        groups = tuple(
            {"name": g.name, "size": g.size, "modules": sorted({s.target for s in g.slots})}
            for g in anatomy.channels.groups
        )
        blocks = tuple(b.name for b in anatomy.blocks)
        return Inspection(anatomy.network.origin, latency_ms, rows, groups, blocks, anatomy.channels.unknown_ops)

    def to_dict(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "latency_ms": self.latency_ms,
            "kernels": [
                {
                    "name": r.name,
                    "nodes": list(r.nodes),
                    "kernel": r.kernel,
                    "channels": list(r.channels),
                    "block": r.block,
                    "latency_ms": r.latency_ms,
                    "share": r.share,
                }
                for r in self.rows
            ],
            "groups": list(self.groups),
            "blocks": list(self.blocks),
            "unknown_ops": list(self.frozen),
        }

    def text(self) -> str:
        lines = [
            f"{self.origin}: {self.latency_ms:.3f} ms, {len(self.rows)} kernels, {len(self.groups)} channel groups"
        ]
        head = ("share", "ms", "layer", "kernel", "channels: groups in -> out", "block")
        table = [
            (
                f"{100 * r.share:.1f}%",
                f"{r.latency_ms:.3f}",
                r.name,
                _short(r.kernel),
                " -> ".join(r.channels),
                r.block or "",
            )
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in [head, *table]) for i in range(len(head))]
        for row in [head, *table]:
            cells = [c.rjust(w) if i < 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        if self.frozen:
            lines.append(f"not understood, so what they touch stays as it is: {', '.join(self.frozen)}")
        lines.append("next: edgeprune compress MODEL --latency 60% --data FOLDER")
        return "\n".join(lines)


def _row(anatomy: Anatomy, span: Span, cost: float, share: float) -> Row:
    channels = tuple(_axis(axis, anatomy) for axis in span.variables)
    block = anatomy.blocks[span.block].name if span.block is not None else None
    kernel = span.site.kernel
    return Row(span.name, span.site.nodes, kernel.key(), channels, block, cost, share)


def _axis(axis: Axis, anatomy: Anatomy) -> str:
    parts = [
        f"{anatomy.channels.groups[g].name}:{anatomy.channels.groups[g].size}" + (f"x{m}" if m > 1 else "")
        for g, m in axis.terms
    ]
    return " + ".join(parts[:3]) + (f" + {len(parts) - 3} more" if len(parts) > 3 else "")


def _short(key: str) -> str:
    """A kernel's key without its lesser attributes: ``Conv 3x3 /2 64x56x56 > 128x28x28 +Relu``."""
    kernel = Kernel.from_key(key)
    words = [kernel.op]
    if size := kernel.attr("kernel_shape"):
        words.append(size)
    if (stride := kernel.attr("strides")) and set(stride.split("x")) != {"1"}:
        words.append("/" + stride.split("x")[0])
    if kernel.attr("group") not in ("", "1"):
        words.append(f"g={kernel.attr('group')}")
    shapes = [*(kernel.inputs[:1]), kernel.output]
    words.append(" > ".join("x".join(map(str, s[1:] or s)) for s in shapes))
    words += [f"+{t}" for t in kernel.tail]
    return " ".join(words)
