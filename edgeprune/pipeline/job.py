"""One compress run from beginning to end: the order of things, and nothing else."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.deploy.export import to_onnx
from edgeprune.deploy.verify import Verification, verify
from edgeprune.device.target import Target
from edgeprune.errors import UsageError
from edgeprune.graph.factor import factored
from edgeprune.graph.fold import denormals, fold
from edgeprune.graph.network import Network
from edgeprune.graph.resolution import Size, at_resolution, size_of
from edgeprune.latency.networks import Timings
from edgeprune.methods import LEARNERS, PLANNERS, SELECTORS, method_name
from edgeprune.pipeline import workdir
from edgeprune.pipeline.apply import State
from edgeprune.pipeline.budget import Budget
from edgeprune.pipeline.certificate import certify, certify_factored, certify_same
from edgeprune.pipeline.judging import Judge
from edgeprune.pipeline.learned import after_search, blocks_first, search_and_shrink, without_blocks
from edgeprune.pipeline.lowrank import Begun, begin
from edgeprune.pipeline.pricing import Pricing
from edgeprune.pipeline.resolution import metadata
from edgeprune.pipeline.scaling import choose, score_images
from edgeprune.pipeline.shrink import Shrunk, shrink, uncut
from edgeprune.plan.problem import Recipe
from edgeprune.prune.select.fp import backward, pursuit
from edgeprune.prune.select.scored import scored
from edgeprune.train.config import History, TrainConfig
from edgeprune.train.config import Progress as Step
from edgeprune.train.data import check_varied
from edgeprune.train.dataset import DataSet
from edgeprune.train.evaluate import agreement, evaluate, output_error
from edgeprune.train.finetune import finetune
from edgeprune.train.loss import as_outputs, check_labels, is_probabilities, is_scores

Callback = Callable[[float, float, str], None]

FINAL_ROUNDS = 30
FEW_IMAGES = 64  # calibration images below which a run says so


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked.

    method:   which channels, a key of ``methods.SELECTORS``, or of ``methods.LEARNERS``, which needs data and training
    planner:  how much of everything, a key of ``methods.PLANNERS``
    data:     images for selection, refitting and training; None: selection looks at the weights alone
    test:     labelled images for the figures only; without it a tenth of ``data`` is held out for them
    images:   how many of ``data`` calibrate selection and refitting
    recovery: how to train, None not at all; a learner's search is part of it
    resolution: the input's height and width of the compressed network; AUTO: decided here; None: as it is
    lowrank:  whether convolutions may become triples of thinner ones, where that is the better bargain
    folder:   where state is kept for the same command to go on with, None nowhere
    """

    network: Network
    budget: Budget
    target: Target
    method: str
    planner: str = "exact"
    data: DataSet | None = None
    test: DataSet | None = None
    images: int = 1024
    recovery: TrainConfig | None = None
    seed: int = 0
    resolution: Size | str | None = None
    lowrank: bool = False
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in LEARNERS:
            return
        if self.lowrank:
            raise UsageError(
                f"--lowrank judges layers as they are, and --method {self.method} trains them first; use --method cap"
            )
        if self.data is None or self.recovery is None:
            raise UsageError(f"--method {self.method} trains while it chooses: it needs --data, and --minutes above 0")
        if PLANNERS[self.planner].needs != "nothing":
            raise UsageError(
                f"--planner {self.planner} looks at images before anything is trained, and --method {self.method} "
                "decides by training; use --planner exact"
            )


@dataclass(slots=True)
class Outcome:
    """What came out. Accuracies are top-1 in 0..1, None where unknown; latencies are ms with their spread."""

    shrunk: Shrunk
    network: Network
    onnx: bytes
    original_onnx: bytes
    certificate: float
    verification: Verification
    comparison: Timings
    budget_ms: float
    accuracy: dict[str, float | None]
    similarity: dict[str, float | None]
    history: History | None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scaling: dict[str, Any] | None = None


def run(job: Job, pricing: Pricing, progress: Callback) -> Outcome:
    """Compress ``job.network``. Raises every error of the tree in errors.py but UsageError for options."""
    clock = _Stopwatch()
    warnings: list[str] = []
    notes: list[str] = []
    original = job.network
    original.module.eval()
    training, held_out = _splits(job)
    progress(0.0, 1.0, "evaluating the original")
    accuracy = {"original": _accuracy(original, held_out)}
    key = workdir.digest(original, _options(job, pricing), _calibration(original, training, 64, job.seed)[0])
    with clock("export"):
        original_onnx = to_onnx(fold(original)).SerializeToString()
    with clock("measure original"):
        progress(0.0, 1.0, "timing the original")
        original_ms = pricing.start(original_onnx)
    budget_ms = job.budget.ms(original_ms)
    if budget_ms >= original_ms:
        raise UsageError(f"--latency {job.budget.text}: the original takes {original_ms:.4g} ms already; ask for less")
    if training is None:
        warnings.append(
            "no --data: channels were chosen by their weights alone and nothing was recovered; "
            "with --data FOLDER of images like those the network will see, far more accuracy is kept"
        )
    if count := denormals(original):
        warnings.append(f"{count} denormal weights, which slow a runtime several times over, are zero in the ONNX file")
    with clock("scale"):
        size, scaling = _resolution(job, key, original_ms, budget_ms, training, pricing, progress)
    base = original if size is None else at_resolution(original, size)
    training, held_out = (_seen(data, base) for data in (training, held_out))
    calibration, labels = _calibration(base, training, job.images, job.seed)
    if training is not None and (seen := check_varied(calibration, training.name)) < FEW_IMAGES:
        warnings.append(f"only {seen} images in --data: what is chosen and refitted by so few may fit nothing else")
    instrument = LEARNERS[job.method].function.instrument if job.method in LEARNERS else None
    start = base if instrument is None else instrument(base)
    with clock("shrink"):
        shrunk = workdir.recall(job.folder, key, start) if job.folder else None
        if shrunk is None:
            start_ms = original_ms if size is None else pricing.clock(start)
            if start_ms <= budget_ms:
                shrunk = uncut(start, original_ms, start_ms)
            else:
                shrunk = _shrunk(
                    job, pricing, base, start, start_ms, budget_ms, training, calibration, labels, key, progress
                )
            shrunk = replace(shrunk, recipe=replace(shrunk.recipe, resolution=size))
            if job.folder:
                workdir.store(job.folder, key, shrunk)
    network = shrunk.network.copy()
    notes += shrunk.notes
    certificate = _certificate(base, start, shrunk.recipe)
    accuracy["shrunk"] = _accuracy(network, held_out)
    config, history = job.recovery, None
    if config is not None and shrunk.learning is not None:
        config = after_search(config, shrunk.learning)
        notes += shrunk.learning.notes
    with clock("recover"):
        if config is not None and training is not None:
            checkpoint = job.folder / f"training-{_training_key(config, shrunk, training)}.pt" if job.folder else None
            history = _recover(original, network, training, config, checkpoint, progress)
            notes += history.notes
    accuracy["final"] = _accuracy(network, held_out) if history else accuracy["shrunk"]
    similarity = _similarity(original, network, held_out or training)
    progress(0.0, 1.0, "writing and checking the file")
    with clock("export"):
        folded = fold(network)
        onnx = to_onnx(folded, metadata=metadata(original, size)).SerializeToString()
        verification = verify(onnx, folded, calibration[:1])
    progress(0.0, 1.0, "timing both")
    with clock("measure"):
        comparison = _final_timing(pricing, {"original": original_onnx, "compressed": onnx}, job.budget)
    return Outcome(
        shrunk, network, onnx, original_onnx, certificate, verification, comparison, budget_ms, accuracy, similarity,
        history, clock.seconds, warnings, notes, scaling,
    )  # fmt: skip


def _certificate(base: Network, start: Network, recipe: Recipe) -> float:
    """The worst of all that was done to ``base``, on its own weights."""
    worst = certify_same(base, start) if start is not base else 0.0
    if recipe.factored:
        whole, start = start, factored(start, recipe.factored)
        worst = max(worst, certify_factored(whole, start, recipe.factored))
    return max(worst, certify(start, recipe))


def _splits(job: Job) -> tuple[DataSet | None, DataSet | None]:
    """(what may be learnt from, what figures are taken on): disjoint."""
    if job.data is None or job.test is not None or len(job.data) < 20:
        return job.data, job.test
    return job.data.split(0.1, job.seed)


def _resolution(
    job: Job, key: str, original_ms: float, budget_ms: float, training: DataSet | None, pricing: Pricing, say: Callback
) -> tuple[Size | None, dict[str, Any] | None]:
    """(the compressed network's input size, None as it is; how it was weighed, None where it was given)."""
    if job.resolution is None or not isinstance(job.resolution, str):
        return job.resolution, None
    assert training is not None
    found = workdir.recall_scaling(job.folder, key) if job.folder else None
    if found is None:
        rest, apart = training.split(score_images(job.network, len(training)) / len(training), job.seed + 1)
        batches, labels = _calibration(job.network, rest, job.images, job.seed)
        judge = Judge(
            job.network, SELECTORS[job.method if job.method in SELECTORS else "cap"].function, batches, say, labels
        )
        found = choose(job.network, original_ms, budget_ms, pricing, judge, pricing.clock, apart, say)
        if job.folder:
            workdir.store_scaling(job.folder, key, found)
    return None if found.size == size_of(job.network) else found.size, found.document


def _seen(data: DataSet | None, network: Network) -> DataSet | None:
    """The data at the size that ``network`` takes."""
    return data if data is None or data.input_shape == network.input_shapes[0] else data.resized(*size_of(network))


def _shrunk(
    job: Job,
    pricing: Pricing,
    base: Network,
    start: Network,
    start_ms: float,
    budget_ms: float,
    data: DataSet | None,
    calibration: list[torch.Tensor],
    labels: torch.Tensor | None,
    key: str,
    progress: Callback,
) -> Shrunk:
    """base: the original at the size that is asked for; start: what plans are made for."""
    planner = PLANNERS[job.planner]
    if job.method not in LEARNERS:
        removes_blocks = planner.decides != "widths"

        def judge_for(thinner: Network | None) -> Judge:
            return Judge(start, SELECTORS[job.method].function, calibration, progress, labels, thinner)

        begun = Begun(start, start_ms, (), ())
        if job.lowrank:
            begun = begin(
                start, start_ms, pricing.original_ms, budget_ms, pricing, judge_for, calibration,
                pursuit if job.method.startswith("fp-omp") else backward, pricing.clock, progress, removes_blocks,
            )  # fmt: skip
        judge = judge_for(begun.network if begun.factored else None)
        shrunk = shrink(
            begun.network, pricing.original_ms, budget_ms, pricing, judge.judge, judge.repair, pricing.clock, progress,
            planner.function, removes_blocks, begun.measured_ms,
        )  # fmt: skip
        return replace(shrunk, recipe=replace(shrunk.recipe, factored=begun.factored), notes=begun.notes)
    assert data is not None
    assert job.recovery is not None
    learner = LEARNERS[job.method]

    def judge_of(network: Network, scores: Mapping[str, np.ndarray]) -> Judge:
        selector = scored(network, scores) if scores else SELECTORS[method_name(None, True)].function
        return Judge(network, selector, calibration, progress, labels)

    state = State(start)
    if learner.decides == "widths" != planner.decides:
        removed = workdir.recall_blocks(job.folder, key) if job.folder else None
        if removed is None:
            removed = blocks_first(
                start, pricing.original_ms, start_ms, budget_ms, pricing, judge_of(start, {}), pricing.clock, progress,
                planner.function,
            )  # fmt: skip
            if job.folder:
                workdir.store_blocks(job.folder, key, removed)
        state = without_blocks(state, removed, judge_of(start, {}))
        start_ms = pricing.clock(state.network) if removed else start_ms
    return search_and_shrink(
        state, base, pricing.original_ms, start_ms, budget_ms, pricing, learner.function, data, job.recovery,
        job.folder / f"search-{key}.pt" if job.folder else None, pricing.clock, progress, planner.function,
        "widths" not in (learner.decides, planner.decides), judge_of,
    )  # fmt: skip


def _training_key(config: TrainConfig, shrunk: Shrunk, data: DataSet) -> str:
    """Names a training run: what it starts from and how it is done."""
    text = f"{shrunk.recipe.to_json()} {config.digest()} {data.name} {len(data)} {data.labelled}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _calibration(
    network: Network, data: DataSet | None, images: int, seed: int
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Inputs in batches, and the classes of all of them if they are known and the network gives scores of classes."""
    batches = [] if data is None else list(data.batches(64, shuffle_seed=seed, limit=images))
    inputs, labels = [x for x, _ in batches], [y for _, y in batches if y is not None]
    if data is None or not labels:
        return inputs, None
    with torch.no_grad():
        sample = as_outputs(network.module(inputs[0]))[0]
    if not is_scores(sample) or is_probabilities(sample):
        return inputs, None
    found = torch.cat(labels)
    check_labels(found.tolist(), sample.shape[1], data.name)
    return inputs, found


def _options(job: Job, pricing: Pricing) -> dict[str, Any]:
    return {
        "budget": job.budget.text,
        "fingerprint": pricing.fingerprint,
        "method": job.method,
        "planner": job.planner,
        "images": job.images,
        "seed": job.seed,
        "resolution": job.resolution,
        "training": job.recovery.digest() if job.method in LEARNERS and job.recovery else None,
        **({"lowrank": True} if job.lowrank else {}),
        "data": None if job.data is None else [job.data.name, len(job.data), _digest(job.data.labels)],
    }


def _digest(labels: np.ndarray | None) -> str | None:
    return None if labels is None else hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()[:16]


def _recover(
    original: Network, network: Network, data: DataSet, config: TrainConfig, checkpoint: Path | None, progress: Callback
) -> History:
    def report(step: Step) -> None:
        progress(step.step, step.steps, "training")

    teacher = copy.deepcopy(original.module)
    return finetune(network.module, teacher, data, config, checkpoint, report)


def _accuracy(network: Network, data: DataSet | None) -> float | None:
    return None if data is None else evaluate(network.module, data)


def _similarity(original: Network, network: Network, data: DataSet | None) -> dict[str, float | None]:
    if data is None:
        return {"agreement": None, "output_error": None}
    return {
        "agreement": agreement(network.module, original.module, data, limit=2000),
        "output_error": output_error(network.module, original.module, data, limit=2000),
    }


def _final_timing(pricing: Pricing, models: dict[str, bytes], budget: Budget) -> Timings:
    """The figure that counts. A budget that seems missed is measured once more, for longer, before that is said."""
    timings = pricing.compare(models, FINAL_ROUNDS)
    before = timings.networks["original"].median_ms
    if timings.ratio("compressed", "original").value * before > budget.ms(before):
        timings = pricing.compare(models, 3 * FINAL_ROUNDS)
    return timings


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str) -> _Stage:
        return _Stage(self.seconds, stage)


class _Stage:
    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.monotonic() - self.start
