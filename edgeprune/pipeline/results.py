"""What the verbs return: objects for Python, ``to_dict`` for machines, ``text`` for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.deploy.bundle import Content, write_files
from edgeprune.deploy.report import Latency, NetworkFacts, Report, render
from edgeprune.deploy.verify import Verification
from edgeprune.errors import BudgetMissedError
from edgeprune.graph.count import count
from edgeprune.graph.factor import inner_layers
from edgeprune.graph.fold import fold
from edgeprune.graph.load import save
from edgeprune.graph.network import Network
from edgeprune.latency.networks import NetworkTiming, Timings
from edgeprune.pipeline.job import Job, Outcome
from edgeprune.pipeline.pricing import Pricing
from edgeprune.pipeline.resolution import preprocessing
from edgeprune.plan.problem import Factoring, Recipe


@dataclass(frozen=True, slots=True)
class Compression:
    """network: the compressed torch network, batch norms in place, ready for training. onnx: the file that ships.
    original_onnx: the original, exported the same way."""

    network: Network
    onnx: bytes
    original_onnx: bytes
    recipe: Recipe
    report: Report
    folder: Path | None

    @staticmethod
    def of(job: Job, outcome: Outcome, pricing: Pricing) -> Compression:
        timings: Timings = outcome.comparison
        before, after = timings.networks["original"], timings.networks["compressed"]
        ratio = timings.ratio("compressed", "original")
        shrunk, accuracy = outcome.shrunk, outcome.accuracy
        report = Report(
            name="model",
            origin=job.network.origin,
            input_shapes=[list(s) for s in outcome.network.input_shapes],
            asked=job.budget.text,
            budget_ms=job.budget.ms(before.median_ms),
            predicted_ms=shrunk.predicted_share * before.median_ms,
            before=_facts(job.network, before, len(outcome.original_onnx), accuracy["original"]),
            after=_facts(outcome.network, after, len(outcome.onnx), accuracy["final"]),
            ratio=[ratio.value, ratio.low, ratio.high],
            certificate=outcome.certificate,
            verification=outcome.verification.to_dict(),
            target=pricing.fingerprint,
            widths=_widths(job.network, outcome.network),
            removed=list(shrunk.recipe.removed),
            untrained_accuracy=accuracy["shrunk"],
            agreement=outcome.similarity["agreement"],
            output_error=outcome.similarity["output_error"],
            method=job.method,
            planner=job.planner,
            gap=max((p.gap for p in shrunk.recipe.steps if p.gap is not None), default=None),
            preprocessing=preprocessing(job.network, shrunk.recipe.resolution),
            scaling=outcome.scaling,
            factored=_factored(job.network, outcome.network, shrunk.recipe.factored),
            seconds={k: round(v, 2) for k, v in outcome.seconds.items()},
            warnings=outcome.warnings,
            notes=outcome.notes,
        )
        folder = job.folder.parent if job.folder else None
        return Compression(outcome.network, outcome.onnx, outcome.original_onnx, shrunk.recipe, report, folder)

    def write(self, folder: Path) -> None:
        """All or nothing. Raises UsageError when the folder cannot be written."""
        files: dict[str, Content] = {
            "model.onnx": self.onnx,
            "original.onnx": self.original_onnx,
            "model.pt2": lambda path: save(self.network, path),
            "plan.json": self.recipe.to_json(),
            "report.json": self.report.to_json(),
        }
        write_files(folder, files)

    def raise_if_missed(self) -> None:
        """Raises BudgetMissedError when the final measurement lies above the budget."""
        if not self.report.met:
            share = self.report.ratio[0]
            error = BudgetMissedError(
                f"the compressed network measures {share * self.report.before.latency.median_ms:.4g} ms "
                f"({100 * share:.1f}% of the original), above the budget of {self.report.budget_ms:.4g} ms; "
                "measure again with `edgeprune measure`, repeat the command, or ask for a smaller --latency"
            )
            error.result = self
            raise error

    def to_dict(self) -> dict[str, Any]:
        files = {} if self.folder is None else {n: str(self.folder / n) for n in ("model.onnx", "model.pt2")}
        return {**asdict(self.report), "met": self.report.met, "files": files}

    def text(self) -> str:
        lines = [render(self.report)]
        if self.folder is not None:
            lines.append(f"written: {self.folder}/model.onnx, original.onnx, model.pt2, plan.json, report.json")
            lines.append(f"next: edgeprune measure {self.folder}/original.onnx {self.folder}/model.onnx")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Networks timed against each other; ``ratios`` are those to the first, with their 95 % confidence intervals."""

    timings: Timings

    @property
    def names(self) -> list[str]:
        return list(self.timings.networks)

    def ratio(self, name: str) -> tuple[float, float, float]:
        """(value, low, high) of a network's time over the first one's."""
        found = self.timings.ratio(name, self.names[0])
        return found.value, found.low, found.high

    def to_dict(self) -> dict[str, Any]:
        return {
            "networks": [
                {**asdict(_latency(t)), "name": name, "ratio": list(self.ratio(name))}
                for name, t in self.timings.networks.items()
            ]
        }

    def text(self) -> str:
        width = max(len(n) for n in self.names)
        lines = []
        for name, t in self.timings.networks.items():
            line = f"{name:<{width}}  {t.median_ms:9.4f} ms  [{t.low_ms:.4f}, {t.high_ms:.4f}]  p90 {t.p90_ms:.4f} ms"
            if name != self.names[0]:
                value, low, high = self.ratio(name)
                line += f"  {100 * value:.1f}% of the first [{100 * low:.1f}, {100 * high:.1f}], {1 / value:.2f}x"
            lines.append(line)
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a profile run found and measured."""

    target: str
    fingerprint: dict[str, object]
    table: str
    rows: int
    measured: int
    failed: int
    networks: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        lines = [f"{self.target}: {self.measured or 'no'} kernels measured; {self.rows} in {self.table}"]
        if self.networks:
            lines.append(f"{self.networks} whole networks timed")
        if self.failed:
            lines.append(f"{self.failed} kernels could not be run on this target; their rows say why")
        lines.append(f"next: edgeprune compress MODEL --target {self.target} --latency 60% --data FOLDER")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Export:
    """path: where the file was written, if it was; onnx: its bytes."""

    path: str | None
    onnx: bytes
    verification: Verification

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": len(self.onnx), "verification": self.verification.to_dict()}

    def text(self) -> str:
        return (
            f"{self.path or 'ONNX'}: {len(self.onnx) / 1e6:.2f} MB, equals torch to {self.verification.error:.1e} "
            f"in {self.verification.runtime}\nnext: edgeprune measure {self.path or 'FILE.onnx'}"
        )


def _facts(network: Network, timing: NetworkTiming, file_bytes: int, accuracy: float | None) -> NetworkFacts:
    counted = count(fold(network))
    return NetworkFacts(_latency(timing), counted.params, counted.macs, file_bytes, accuracy)


def _latency(timing: NetworkTiming) -> Latency:
    return Latency(timing.median_ms, timing.low_ms, timing.high_ms, timing.p90_ms, timing.samples)


def _factored(before: Network, after: Network, factorings: Sequence[Factoring]) -> dict[str, dict[str, Sequence[int]]]:
    """Layer -> side -> (rank now, channels of the original), of the factored layers that are still there."""
    found: dict[str, dict[str, Sequence[int]]] = {}
    for f in factorings:
        paths = inner_layers(after, f)
        if paths is not None:
            core: Any = after.module.get_submodule(paths["core"])
            old: Any = before.module.get_submodule(f.layer)
            both = (("inputs", f.inputs, core.in_channels, old.in_channels),
                    ("outputs", f.outputs, core.out_channels, old.out_channels))  # fmt: skip
            found[f.layer] = {side: (int(rank), int(full)) for side, kept, rank, full in both if kept is not None}
    return found


def _widths(before: Network, after: Network) -> dict[str, Sequence[int]]:
    """Channels of every narrowed layer: module path -> (kept, had)."""
    result: dict[str, Sequence[int]] = {}
    shapes = {k: v.shape for k, v in before.module.state_dict().items()}
    for name, tensor in after.module.state_dict().items():
        if name.endswith(".weight") and tensor.dim() >= 2 and name in shapes and tensor.shape[0] != shapes[name][0]:
            result[name.removesuffix(".weight")] = (int(tensor.shape[0]), int(shapes[name][0]))
    return result
