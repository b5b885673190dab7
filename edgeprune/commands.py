"""What each command does: one call into ``api``, and its answer as a document and as text.

Everything is imported where it is used, so that ``edgeprune --help`` and a wrong option need no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.errors import BudgetMissedError, DeviceError, TableError, UsageError


def _load(options: argparse.Namespace) -> Any:
    from edgeprune import api
    from edgeprune.graph.load import parse_input

    shapes = parse_input(options.input) if options.input else None
    return api.load(options.model, input_shapes=shapes, factory=options.factory, trust=options.trust)


def compress(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune.progress import Progress

    shown = Progress()
    missed: dict[str, Any] = {}
    try:
        result = _compressed(options, shown)
    except BudgetMissedError as error:
        if error.result is None:
            raise
        shown.clear()
        print(f"edgeprune: {error}", file=sys.stderr)
        result, missed = error.result, {"exit_code": error.exit_code}
    shown.clear()
    return result.to_dict() | missed, result.text()


def _compressed(options: argparse.Namespace, shown: Callable[[float, float, str], None]) -> Any:
    from edgeprune import api

    return api.compress(
        _load(options),
        latency=options.latency,
        target=options.target,
        threads=options.threads,
        on=options.on,
        data=options.data,
        test=options.test,
        normalize=options.normalize,
        method=options.method,
        planner=options.planner,
        resolution=options.resolution,
        lowrank=options.lowrank,
        images=options.images,
        minutes=options.minutes,
        epochs=options.epochs,
        seed=options.seed,
        out=options.out or _folder(options.model, options.latency),
        progress=shown,
    )


def redesign(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api
    from edgeprune.progress import Progress

    shown = Progress()
    result = api.redesign(
        _load(options),
        factor=options.factor,
        target=options.target,
        threads=options.threads,
        on=options.on,
        data=options.data,
        test=options.test,
        normalize=options.normalize,
        method=options.method,
        minutes=options.minutes,
        epochs=options.epochs,
        seed=options.seed,
        out=options.out or _folder(options.model, "redesign"),
        progress=shown,
    )
    shown.clear()
    return result.to_dict(), result.text()


def rebuild(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api

    network = api.rebuild(_load(options), options.plan, options.out, seed=options.seed)
    count = sum(p.numel() for p in network.module.parameters())
    return {"path": options.out, "params": count}, f"{options.out}: {count} parameters, random weights"


def _folder(model: str, latency: str) -> str:
    """MODEL-BUDGET beside the model."""
    path = Path(model)
    return str(path.with_name(f"{path.stem}-{latency.strip().replace('%', 'pct')}"))


def profile(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api
    from edgeprune.progress import Progress

    if options.check:
        if options.model:
            raise UsageError("--check measures kernels of the table again; leave --model out")
        found = api.check_table(target=options.target, threads=options.threads, on=options.on, progress=Progress())
        return found.to_dict() | {"exit_code": 0 if found.holds else TableError.exit_code}, found.text()
    network = _load(options) if options.model else None
    result = api.profile(network, target=options.target, threads=options.threads, on=options.on, progress=Progress())
    return result.to_dict(), result.text()


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api
    from edgeprune.progress import Progress

    result = api.measure(
        *options.files,
        target=options.target,
        threads=options.threads,
        on=options.on,
        rounds=options.rounds,
        progress=Progress(),
    )
    return result.to_dict(), result.text()


def export(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api

    out = options.out or str(Path(options.model).with_suffix(".onnx"))
    if not options.out and Path(out).exists():
        raise UsageError(
            f"{out} is there already; say where to write: edgeprune export {options.model} --out FILE.onnx"
        )
    result = api.export(_load(options), out)
    return result.to_dict(), result.text()


def inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api
    from edgeprune.progress import Progress

    result = api.inspect(
        _load(options), target=options.target, threads=options.threads, on=options.on, progress=Progress()
    )
    return result.to_dict(), result.text()


def targets(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api

    if options.action == "fetch":
        folder = api.fetch(options.name or "web-wasm", options.archive)
        return {"path": str(folder)}, f"{folder}: ready"
    found = api.targets()
    width = max(len(t["name"]) for t in found)
    lines = [f"{t['name']:<{width}}  {t['summary']}  ({t['path']})" for t in found]
    return {"targets": found}, "\n".join(lines)


def methods(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api

    found = api.list_methods()
    rows = [{**m, "minutes": f"{m['minutes']:g} min"} for m in found]
    columns = ("name", "needs", "decides", "minutes", "summary")
    widths = {c: max(len(row[c]) for row in rows) for c in columns}
    lines: list[str] = []
    option = ""
    for row in rows:
        if row["option"] != option:
            option = row["option"]
            lines += [*([""] if lines else []), f"{option} NAME"]
        lines.append("  " + "  ".join(f"{row[c]:<{widths[c]}}" for c in columns) + f"  ({row['source']})")
        if row["default"]:
            lines[-1] += f"  [{row['default']}]"
    return {"methods": found}, "\n".join(lines)


def doctor(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api
    from edgeprune.progress import Progress

    shown = Progress()
    found = api.doctor(options.target, threads=options.threads, on=options.on, progress=shown)
    shown.clear()
    failed = any(not finding.ok for finding in found.findings if finding.subject == options.target)
    return found.to_dict() | {"exit_code": DeviceError.exit_code if failed else 0}, found.text()
