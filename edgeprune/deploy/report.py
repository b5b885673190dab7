"""What a run was asked, what it predicted and what was measured: ``report.json``, and the table at its end.

Report(...).to_json()    the file; every field below is a key of the same name
Report.from_json(text)   back again
render(report)           the table for a terminal
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgeprune.errors import UsageError

REPORT_VERSION = 1
TIMING_SPREAD = 0.02  # of a whole network timed twice on a busy machine


@dataclass(frozen=True, slots=True)
class Latency:
    """Measured time of one sample: the median, its 95 % confidence interval, the 90th percentile."""

    median_ms: float
    low_ms: float
    high_ms: float
    p90_ms: float
    samples: int

    @property
    def spread(self) -> float:
        """Half the confidence interval over the median."""
        return (self.high_ms - self.low_ms) / 2 / self.median_ms


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """One network, before or after. ``accuracy``: share of the test samples it gets right, None without labels."""

    latency: Latency
    params: int
    macs: int
    file_bytes: int
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """
    name:          file name of the deliverables without suffix
    origin:        where the network came from
    input_shapes:  of the delivered network, batch 1 in front
    asked:         the budget as it was typed ("60%"); ``budget_ms`` what it came to
    predicted_ms:  latency of the plan by the table alone: its share of the original there, times ``before``
    before, after: the original and the compressed network, measured interleaved; ``ratio`` after / before with its
                   95 % confidence interval (value, low, high)
    untrained_accuracy: accuracy of the cut network before any training, None without labels
    agreement:     share of samples on which both networks decide the same, None without data
    output_error:  relative squared error of the outputs, None without data
    certificate:   largest relative error of "cut == original with the same channels masked" in this very run
    verification:  the exported file against torch (see ``edgeprune.deploy.verify.Verification``)
    target:        name, runtime and fingerprint of the device that measured
    widths:        group -> (units kept, units it had); groups that kept all are left out
    removed:       names of the removed blocks
    factored:      layer -> {"inputs", "outputs": (rank, channels it had there)}, of convolutions that became thinner
                   ones and are still there
    method, planner: how channels were ranked, and what decided how much of everything stays
    gap:           proven relative gap of the plan, None if it was not planned by the exact solver
    preprocessing: what must be done to inputs that the original did not need; empty for none
    scaling:       how depth, width and resolution were weighed: the samples, latency's powers, the point chosen; None
                   where the resolution was not decided
    seconds:       duration by stage
    warnings:      what makes the result worse than it could be
    notes:         what training has to say of itself
    """

    name: str
    origin: str
    input_shapes: Sequence[Sequence[int]]
    asked: str
    budget_ms: float
    predicted_ms: float
    before: NetworkFacts
    after: NetworkFacts
    ratio: Sequence[float]
    certificate: float
    verification: Mapping[str, Any]
    target: Mapping[str, Any]
    widths: Mapping[str, Sequence[int]]
    removed: Sequence[str] = ()
    untrained_accuracy: float | None = None
    agreement: float | None = None
    output_error: float | None = None
    method: str | None = None
    planner: str | None = None
    gap: float | None = None
    preprocessing: str = ""
    scaling: Mapping[str, Any] | None = None
    factored: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def met(self) -> bool:
        """The compressed network's measured share of the original's latency lies within the budget, timing spread
        allowed for."""
        return self.ratio[0] * self.before.latency.median_ms <= self.budget_ms * (1 + TIMING_SPREAD)

    def to_json(self) -> str:
        return json.dumps({"version": REPORT_VERSION, "met": self.met, **asdict(self)}, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Report:
        """Raises UsageError when the text is no report."""
        try:
            doc = json.loads(text)
            if doc.pop("version") != REPORT_VERSION:
                raise UsageError(f"report.json has another version; this edgeprune reads version {REPORT_VERSION}")
            doc.pop("met")
            for key in ("before", "after"):
                facts = doc[key]
                doc[key] = NetworkFacts(**{**facts, "latency": Latency(**facts["latency"])})
            return Report(**doc)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"not a report: {error!r}; expected the report.json of `edgeprune compress`") from None


def render(report: Report) -> str:
    """The table that ends a run: asked, predicted and measured, before and after; then what to know."""
    before, after = report.before, report.after
    over = report.ratio[0] * before.latency.median_ms / report.budget_ms - 1
    verdict = "met" if over <= 0 else f"met, {over:.1%} over, within the {TIMING_SPREAD:.0%} that timing spreads"
    verdict = verdict if report.met else f"MISSED by {over:.1%}"
    bytes_before, bytes_after = before.file_bytes, after.file_bytes
    rows = [
        ["", "asked", "predicted", "before", "after", "after / before"],
        [
            "latency",
            f"{_ms(report.budget_ms)} ({report.asked})" if not _is_time(report.asked) else _ms(report.budget_ms),
            _ms(report.predicted_ms),
            _measured(before.latency),
            _measured(after.latency),
            f"{report.ratio[0]:.3f} ({report.ratio[1]:.3f}..{report.ratio[2]:.3f})",
        ],
        ["accuracy", "-", "-", _percent(before.accuracy), _percent(after.accuracy), _points(before, after)],
        ["parameters", "", "", _count(before.params), _count(after.params), _share(before.params, after.params)],
        ["multiply-adds", "", "", _count(before.macs), _count(after.macs), _share(before.macs, after.macs)],
        ["file", "", "", _size(bytes_before), _size(bytes_after), _share(bytes_before, bytes_after)],
    ]
    lines = [*_table(rows), "", f"budget {verdict}: {_ms(after.latency.median_ms)} of {_ms(report.budget_ms)}"]
    if report.untrained_accuracy is not None and report.untrained_accuracy != after.accuracy:
        lines.append(f"accuracy before training: {_percent(report.untrained_accuracy)}")
    if report.agreement is not None:
        lines.append(f"same decision as the original on {report.agreement:.1%} of the samples")
    error = report.verification.get("error")
    lines.append(
        f"checked: cut == masked original to {report.certificate:.1e}"
        + (f", file == torch to {error:.1e}" if error is not None else "")
    )
    lines.append(f"groups narrowed: {len(report.widths)}, blocks removed: {len(report.removed)}")
    if report.factored:
        lines.append("layers factored: " + ", ".join(_ranks(layer, sides) for layer, sides in report.factored.items()))
    if report.preprocessing:
        lines.append(
            f"input {' and '.join('x'.join(map(str, s)) for s in report.input_shapes)}: {report.preprocessing}"
        )
    if report.scaling is not None:
        lines.append(_weighed(report.scaling))
    lines += [f"note: {text}" for text in report.notes]
    lines += [f"warning: {text}" for text in report.warnings]
    return "\n".join(lines)


def _ranks(layer: str, sides: Mapping[str, Sequence[int]]) -> str:
    return f"{layer} ({', '.join(f'{side} {full} -> {rank}' for side, (rank, full) in sides.items())})"


def _weighed(scaling: Mapping[str, Any]) -> str:
    chosen = scaling["chosen"]
    return (
        f"weighed on {len(scaling['samples'])} samples: depth {chosen['depth']:.2f}, width {chosen['width']:.2f}, "
        f"resolution {chosen['resolution']:.2f} ({chosen['input'][0]}x{chosen['input'][1]})"
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _is_time(text: str) -> bool:
    return text.strip().endswith("s")


def _ms(value: float) -> str:
    return f"{value * 1000:.0f} us" if value < 1 else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _measured(latency: Latency) -> str:
    return f"{_ms(latency.median_ms)} ±{latency.spread:.1%}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _points(before: NetworkFacts, after: NetworkFacts) -> str:
    if before.accuracy is None or after.accuracy is None:
        return "-"
    return f"{100 * (after.accuracy - before.accuracy):+.2f} points"


def _count(value: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _size(value: int) -> str:
    return f"{value / 1e6:.3g} MB" if value >= 1e6 else f"{value / 1e3:.3g} kB"


def _share(before: int, after: int) -> str:
    return f"{after / before:.3f}" if before else "-"
