"""The verbs, each a page of plain calls: load, profile, compress, export, measure, inspect; what they know: targets,
list_methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune import methods
from edgeprune.deploy.bundle import write_files
from edgeprune.deploy.export import to_onnx
from edgeprune.deploy.verify import verify
from edgeprune.device import ortweb
from edgeprune.device.target import find_target, list_targets, read_target
from edgeprune.errors import DeviceError, UsageError
from edgeprune.graph.fold import fold
from edgeprune.graph.lift import lift
from edgeprune.graph.load import load, save
from edgeprune.graph.network import Network
from edgeprune.pipeline import job as jobs
from edgeprune.pipeline import workdir
from edgeprune.pipeline.budget import parse_budget
from edgeprune.pipeline.doctor import check_table, doctor
from edgeprune.pipeline.inspection import Inspection
from edgeprune.pipeline.pricing import Pricing
from edgeprune.pipeline.redesign import Redesign, fresh, plan_for, train_wide, widened
from edgeprune.pipeline.resolution import parse_resolution
from edgeprune.pipeline.results import Comparison, Compression, Export, Profile
from edgeprune.pipeline.spans import dissect
from edgeprune.plan.problem import Recipe
from edgeprune.progress import Callback, silent
from edgeprune.train.config import TrainConfig
from edgeprune.train.data import open_data
from edgeprune.train.dataset import DataSet
from edgeprune.train.evaluate import evaluate
from edgeprune.train.modules import place

__all__ = [
    "check_table", "compress", "doctor", "export", "fetch", "inspect", "list_methods", "load", "measure", "profile",
    "rebuild", "redesign", "save", "targets",
]  # fmt: skip

Model = nn.Module | Network | str | Path
Shape = Sequence[int]


def profile(
    model: Model | None = None,
    *,
    input_shape: Shape | None = None,
    target: str = "cpu",
    threads: int | None = None,
    on: str | None = None,
    progress: Callback = silent,
) -> Profile:
    """Measure what a target's table lacks: its stairs, and every kernel a plan of ``model`` may contain.

    on: "HOST" or "HOST,HOST": the target is there, and reached by ssh; of a browser target the address to serve its
        page on

    Raises DeviceError when the target is unknown or does not answer. Doing it again measures nothing.
    """
    with Pricing(find_target(target, threads, on), progress) as pricing:
        if model is not None:
            pricing.complete_table(dissect(_network(model, input_shape), pricing.fusion))
        tally, table = pricing.tally, pricing.table
        return Profile(
            target, pricing.fingerprint, str(table.path), len(table.rows), tally.measured, tally.failed,
            tally.networks,
        )  # fmt: skip


def compress(
    model: Model,
    *,
    latency: str,
    data: Any = None,
    test: Any = None,
    input_shape: Shape | None = None,
    target: str = "cpu",
    threads: int | None = None,
    on: str | None = None,
    normalize: str | None = None,
    method: str | None = None,
    planner: str | None = None,
    resolution: str | int | None = None,
    lowrank: bool = False,
    images: int = 1024,
    minutes: float | None = None,
    epochs: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Callback = silent,
) -> Compression:
    """Shrink ``model`` until its latency, measured on the target, is within ``latency``.

    model:       an nn.Module (with ``input_shape``, batch in front), a Network, or a model file
    latency:     "10ms", "800us", "60%" of the original, "1.7x"
    data:        a folder of images, an .npz, "file.py:function", arrays, or any iterable of batches; labels optional
    test:        labelled data for the figures only
    method:      which channels: a key of ``edgeprune.methods.SELECTORS`` (default: the best for what there is)
    planner:     how much of everything is decided: a key of ``edgeprune.methods.PLANNERS`` (default: exact)
    resolution:  height and width of the compressed network's input: 160, or "160x120"; inputs are resized to it;
        "auto": decided together with depth and width (also by planner "3d")
    lowrank:     whether convolutions may become 1x1 -> KxK -> 1x1 where the table says that this is faster, and it
        hurts less than narrowing
    images:      calibration images
    on:          "HOST" or "HOST,HOST": the target is there, and reached by ssh; of a browser target the address to
        serve its page on
    minutes, epochs: length of the recovery training (default: 10 minutes; 0 is none)
    out:         directory for the deliverables and for what lets the same call go on after an interruption

    Raises BudgetUnreachableError before any work, BudgetMissedError (after writing ``out``) when the final measurement
    lies above the budget, and the other errors of ``edgeprune.errors``.
    """
    budget, network = parse_budget(latency), _network(model, input_shape)
    method = methods.method_name(method, data is not None)
    planner = methods.planner_name(planner, data is not None)
    size = parse_resolution(methods.resolution_for(planner, resolution, data is not None), network)
    if minutes is not None and epochs is not None:
        raise UsageError("--minutes and --epochs exclude each other; give one of them")
    if images < 1:
        raise UsageError(f"--images {images}: expected at least 1")
    if (data is not None or test is not None) and len(network.input_shapes) > 1:
        raise UsageError(
            "a network of several inputs can be compressed without --data only; leave --data and --test out"
        )
    for name, value in (("--minutes", minutes), ("--epochs", epochs)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name} {value}: expected 0 or more")
    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or more")
    shape = network.input_shapes[0]
    mean, std = _normalisation(normalize)
    folder = Path(out) if out is not None else None
    if folder:
        _make(folder / "work")
    wanted = find_target(target, threads, on)
    job = jobs.Job(
        network=network,
        budget=budget,
        target=wanted,
        data=None if data is None else open_data(data, shape, mean=mean, std=std),
        test=None if test is None else _labelled(open_data(test, shape, mean=mean, std=std)),
        method=method,
        planner=planner,
        images=images,
        recovery=_recovery(minutes, epochs, seed),
        seed=seed,
        resolution=size,
        lowrank=lowrank,
        folder=folder / "work" if folder else None,
    )
    with Pricing(wanted, progress) as pricing:
        outcome = jobs.run(job, pricing, progress)
        result = Compression.of(job, outcome, pricing)
    if folder:
        result.write(folder)
        if not result.report.met:
            workdir.forget(folder / "work")
    result.raise_if_missed()
    return result


def export(model: Model, out: str | Path | None = None, *, input_shape: Shape | None = None) -> Export:
    """The dense ONNX file of a network: batch norms folded, verified in onnxruntime against torch.

    Raises UnsupportedModelError naming an operator that has no ONNX form here, VerificationError when outputs differ.
    """
    network = fold(_network(model, input_shape))
    onnx = to_onnx(network).SerializeToString()
    verification = verify(onnx, network, [])
    if out is not None:
        path = Path(out)
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: there is no directory {path.parent}; make it first")
        write_files(path.parent, {path.name: onnx})
    return Export(str(out) if out is not None else None, onnx, verification)


def measure(
    *models: Model | bytes,
    input_shape: Shape | None = None,
    target: str = "cpu",
    threads: int | None = None,
    on: str | None = None,
    rounds: int = 40,
    progress: Callback = silent,
) -> Comparison:
    """Time ONNX files (paths or bytes; or modules, which are exported first) against each other, interleaved.

    The ratios are those to the first. Raises UsageError for a file that is no ONNX file, DeviceError when the runtime
    refuses it.
    """
    if not models:
        raise UsageError("measure needs at least one ONNX file")
    if rounds < 1:
        raise UsageError(f"--rounds {rounds}: expected at least 1")
    named = {}
    for i, model in enumerate(models):
        name = str(model) if isinstance(model, (str, Path)) else f"model {i + 1}"
        named[name if name not in named else f"{name} ({i + 1})"] = _onnx(model, input_shape)
    with Pricing(find_target(target, threads, on), progress) as pricing:
        return Comparison(pricing.compare(named, rounds))


def inspect(
    model: Model,
    *,
    input_shape: Shape | None = None,
    target: str = "cpu",
    threads: int | None = None,
    on: str | None = None,
    progress: Callback = silent,
) -> Inspection:
    """The three views of a network side by side: nodes, channel groups, and kernels with their share of the latency."""
    with Pricing(find_target(target, threads, on), progress) as pricing:
        anatomy = dissect(_network(model, input_shape), pricing.fusion)
        original_ms = pricing.start(to_onnx(anatomy.folded).SerializeToString())
        pricing.measure_as_it_is(anatomy)
        return Inspection.of(anatomy, original_ms, pricing.kernel_ms)


def redesign(
    model: Model,
    *,
    data: Any,
    factor: float = 1.25,
    method: str = "aofp",
    test: Any = None,
    input_shape: Shape | None = None,
    target: str = "cpu",
    threads: int | None = None,
    on: str | None = None,
    normalize: str | None = None,
    minutes: float | None = None,
    epochs: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Callback = silent,
) -> Redesign:
    """Widen the inner layers of ``model``, train, and compress back to the latency it had: other widths, same time.

    factor:          how much wider
    minutes, epochs: half is for the wide network, half for ``compress`` (default: 20 minutes)
    The rest as for ``compress``. ``out`` also gets ``redesign.json``, the widths as a plan for ``rebuild``.
    """
    network = _network(model, input_shape)
    config = _recovery(None if minutes is None else minutes / 2, None if epochs is None else epochs / 2, seed)
    if config is None:
        raise UsageError("redesign trains: give --minutes or --epochs above 0")
    wide = widened(network, factor, seed)
    mean, std = _normalisation(normalize)
    opened = open_data(data, network.input_shapes[0], mean=mean, std=std)
    tested = None if test is None else _labelled(open_data(test, network.input_shapes[0], mean=mean, std=std))
    if out is not None:
        _make(Path(out) / "work")
    before = None if tested is None else evaluate(network.module, tested)
    train_wide(network, wide, opened, config, None if out is None else Path(out) / "work" / "wide.pt", progress)
    with Pricing(find_target(target, threads, on), progress) as pricing:
        models = {name: to_onnx(fold(n)).SerializeToString() for name, n in (("original", network), ("wide", wide))}
        share = pricing.compare(models).ratio("original", "wide").value
    if share >= 1:
        raise UsageError(f"{factor:g} times as wide takes no longer on {target}: nothing to take back; ask for more")
    result = compress(
        wide, latency=f"{100 * share:.2f}%", data=opened, test=tested, target=target, threads=threads, on=on,
        method=method, minutes=config.minutes, epochs=config.epochs, seed=seed, out=out, progress=progress,
    )  # fmt: skip
    plan = plan_for(network, wide, result.recipe)
    found = Redesign(result, plan, factor, share, before, None if tested is None else evaluate(wide.module, tested))
    if out is not None:
        write_files(Path(out), {"redesign.json": found.recipe().to_json()})
    return found


def rebuild(
    model: Model,
    plan: str | Path,
    out: str | Path | None = None,
    *,
    input_shape: Shape | None = None,
    seed: int = 0,
) -> Network:
    """A fresh network, with random weights, of ``model``'s form and the widths, blocks and factored layers of a
    ``redesign.json`` or ``plan.json``.

    Raises UsageError when the plan cannot be read or is for another network.
    """
    try:
        recipe = Recipe.from_json(Path(plan).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = "not a text file" if isinstance(error, ValueError) else error.strerror or error
        raise UsageError(
            f"{plan}: {reason}; expected the redesign.json of `edgeprune redesign`, or the plan.json "
            "of `edgeprune compress`"
        ) from None
    network = fresh(_network(model, input_shape), recipe, seed)
    if out is not None:
        save(network, out)
    return network


def list_methods() -> list[dict[str, Any]]:
    """What ``compress`` takes as ``method`` and ``planner``: option, name, default (when it is taken without being
    named), needs, decides, minutes (typical), summary, source."""
    return methods.table()


def targets() -> list[dict[str, str]]:
    """Name, one-line summary and file of every target that can be named."""
    found = []
    for name, path in list_targets().items():
        try:
            summary = read_target(path).description
        except DeviceError as error:
            summary = f"broken: {error}"
        found.append({"name": name, "summary": summary, "path": str(path)})
    return found


def fetch(target: str, archive: str | Path | None = None) -> Path:
    """Put what a browser target serves, the files of onnxruntime-web, into the user's cache: from the npm registry, or
    from the package ``archive``. Raises DeviceError when they cannot be had, UsageError when the target needs none."""
    if find_target(target).device != "browser":
        raise UsageError(f"target {target} needs nothing fetched; expected a browser target, such as web-wasm")
    return ortweb.fetch(None if archive is None else Path(archive))


def _network(model: Model, input_shape: Shape | None) -> Network:
    if isinstance(model, Network):
        return model
    if isinstance(model, (str, Path)):
        return load(model, input_shapes=None if input_shape is None else [input_shape])
    if input_shape is None:
        raise UsageError("a module does not tell its input shape; give input_shape=(1, 3, 224, 224) or the like")
    network = lift(model, [input_shape], type(model).__name__).copy()
    place(network.module, torch.device("cpu"), torch.contiguous_format)
    return network


def _labelled(test: DataSet) -> DataSet:
    if not test.labelled:
        raise UsageError(
            f"--test {test.name}: has no labels, and they are all it is for; give labelled samples (a folder with one "
            "sub-folder for each class, or an .npz with y), or leave --test out"
        )
    return test


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot write to {folder.parent} ({error.strerror}); give another directory") from None


def _onnx(model: Model | bytes, input_shape: Shape | None) -> bytes:
    if isinstance(model, bytes):
        return model
    if isinstance(model, (str, Path)):
        try:
            content = Path(model).read_bytes()
        except OSError as error:
            raise UsageError(f"{model}: {error.strerror or error}; expected an ONNX file") from None
        if content[:2] == b"PK" or not content:
            raise UsageError(f"{model}: not an ONNX file; make one with `edgeprune export {model}`")
        return content
    return to_onnx(fold(_network(model, input_shape))).SerializeToString()


def _normalisation(text: str | None) -> tuple[Any, Any]:
    """``imagenet``, ``none``, or ``m,m,m/s,s,s``."""
    if text is None or text in ("imagenet", "none"):
        return text, text
    means, slash, deviations = text.partition("/")
    try:
        if not slash:
            raise ValueError
        return tuple(map(float, means.split(","))), tuple(map(float, deviations.split(",")))
    except ValueError:
        raise UsageError(
            f"--normalize {text!r}: expected imagenet, none, or means and deviations m,m,m/s,s,s"
        ) from None


def _recovery(minutes: float | None, epochs: float | None, seed: int) -> TrainConfig | None:
    if minutes == 0 or epochs == 0:
        return None
    if epochs is not None:
        return TrainConfig(epochs=epochs, seed=seed)
    return TrainConfig(minutes=10.0 if minutes is None else minutes, seed=seed)
