"""The command line: parse, one call into ``api``, print."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.errors import BudgetMissedError, EdgepruneError, UsageError

EXIT_CODES = """exit codes:
  0  done                              6  the target is unknown or does not answer
  1  an unexpected edgeprune error     7  the latency table lacks what is needed
  2  a wrong option or argument        8  no plan can reach the budget (the smallest latency is named)
  3  the model file is broken/refused  9  the built file measures above the budget
  4  the network is not supported     10  the exported file computes something else
  5  the data cannot be read         130  interrupted; the same command goes on with the rest
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``edgeprune``; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            document, text = options.run(options)
        print(json.dumps(document, indent=1) if options.json else text)
        return int(document.get("exit_code", 0))
    except EdgepruneError as error:
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}))
        print(f"edgeprune: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("edgeprune: interrupted; the same command goes on with what is finished", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"edgeprune: {error}; make room or give another place", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edgeprune",
        description="Make a trained convolutional network meet a latency budget measured on the target.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgeprune {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_compress(commands)
    _add_profile(commands)
    _add_redesign(commands)
    _add_rebuild(commands)
    _add_measure(commands)
    _add_export(commands)
    _add_inspect(commands)
    _add_targets(commands)
    _add_methods(commands)
    return parser


def _command(commands: Any, name: str, run: Any, help_text: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def _model_options(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    name = "model" if positional else "--model"
    parser.add_argument(
        name,
        metavar="MODEL",
        help="torch.export archive, TorchScript, state_dict (with --factory) or pickled module (with --trust)",
    )
    parser.add_argument("--input", metavar="1x3x224x224", help="input shape, where the file does not tell it")
    parser.add_argument("--factory", metavar="FILE.py:FUNC", help="makes the nn.Module that a plain state_dict fills")
    parser.add_argument("--trust", action="store_true", help="open a pickled module, which runs code out of the file")


def _target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default="cpu", help="a target file's name (default: cpu; see `edgeprune targets`)")
    parser.add_argument("--threads", type=int, help="override the target's number of threads")
    parser.add_argument("--on", metavar="HOST[,HOST]", help="measure there, through ssh; several hosts share the work")
    parser.add_argument(
        "--listen", dest="on", metavar="ADDRESS[:PORT]", help="of a browser target: serve its page on this address"
    )


def _add_compress(commands: Any) -> None:
    parser = _command(
        commands, "compress", _compress, "shrink a network until its measured latency is within a budget",
        "edgeprune compress model.pt2 --latency 10ms --data photos/",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("--latency", required=True, metavar="BUDGET", help="10ms, 800us, 60%% of the original, 1.7x")
    _target_options(parser)
    parser.add_argument(
        "--data", metavar="SPEC", help="training images: a folder, an .npz, or FILE.py:FUNC; labels are optional"
    )
    parser.add_argument("--test", metavar="SPEC", help="labelled images that are used for nothing but the final figure")
    parser.add_argument("--normalize", metavar="M,M,M/S,S,S", help="imagenet, none (default), or means/deviations")
    parser.add_argument("--method", help="which channels (default: cap; without --data magnitude-in)")
    parser.add_argument("--planner", help="how much of everything (default: exact); see `edgeprune methods`")
    parser.add_argument(
        "--resolution",
        metavar="HxW",
        help="the compressed network's input: auto, or a size smaller than the original's",
    )
    parser.add_argument(
        "--lowrank", action="store_true", help="factor convolutions where that is faster and hurts less than narrowing"
    )
    parser.add_argument("--images", type=int, default=1024, help="calibration images (default: 1024)")
    parser.add_argument("--minutes", type=float, help="time for recovery training (default: 10; 0: none)")
    parser.add_argument("--epochs", type=float, help="passes of recovery training, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="where the results go (default: MODEL-BUDGET beside the model)")


def _add_profile(commands: Any) -> None:
    parser = _command(
        commands, "profile", _profile, "measure a target's latency table, or what a model still lacks in it",
        "edgeprune profile --target cpu --model model.pt2",
    )  # fmt: skip
    _model_options(parser, positional=False)
    _target_options(parser)


def _add_redesign(commands: Any) -> None:
    parser = _command(
        commands, "redesign", _redesign, "widen a network inside, train, and compress it back to the latency it had",
        "edgeprune redesign model.pt2 --data photos/ --minutes 60",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("--factor", type=float, default=1.25, help="how much wider (default: 1.25)")
    _target_options(parser)
    parser.add_argument("--data", required=True, metavar="SPEC", help="training images, as for compress")
    parser.add_argument("--test", metavar="SPEC", help="labelled images that are used for nothing but the final figure")
    parser.add_argument("--normalize", metavar="M,M,M/S,S,S", help="imagenet, none (default), or means/deviations")
    parser.add_argument("--method", default="aofp", help="what takes it back, as for compress (default: aofp)")
    parser.add_argument("--minutes", type=float, help="time for all training (default: 20)")
    parser.add_argument("--epochs", type=float, help="passes of all training, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="where the results go (default: MODEL-redesign beside the model)")


def _add_rebuild(commands: Any) -> None:
    parser = _command(
        commands, "rebuild", _rebuild, "make a fresh network of the form that redesign or compress found",
        "edgeprune rebuild model.pt2 out/redesign.json --out fresh.pt2",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("plan", metavar="PLAN.json", help="redesign.json, or the plan.json of compress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="FILE.pt2")


def _add_measure(commands: Any) -> None:
    parser = _command(
        commands, "measure", _measure, "time ONNX files against each other, interleaved",
        "edgeprune measure original.onnx out/model.onnx",
    )  # fmt: skip
    parser.add_argument("files", nargs="+", metavar="FILE.onnx", help="one file, or two to compare")
    _target_options(parser)
    parser.add_argument("--rounds", type=int, default=40, help="interleaved rounds (default: 40)")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", _export, "write the dense ONNX file of a network, such as a retrained .pt2",
        "edgeprune export out/model.pt2 --out model.onnx",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("--out", metavar="FILE.onnx", help="(default: MODEL with .onnx)")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", _inspect, "show a network's nodes, channel groups and kernels with their latency",
        "edgeprune inspect model.pt2",
    )  # fmt: skip
    _model_options(parser)
    _target_options(parser)


def _add_targets(commands: Any) -> None:
    parser = _command(
        commands, "targets", _targets, "list the known targets, or fetch what one needs", "edgeprune targets"
    )
    parser.add_argument("action", nargs="?", choices=["list", "fetch"], default="list", help="(default: list)")
    parser.add_argument("name", nargs="?", metavar="TARGET", help="of fetch: a browser target, such as web-wasm")
    parser.add_argument("--from", dest="archive", metavar="FILE.tgz", help="of fetch: the npm package, fetched already")


def _add_methods(commands: Any) -> None:
    _command(
        commands, "methods", _methods, "list what --method and --planner can be, and what each needs and costs",
        "edgeprune methods",
    )  # fmt: skip


def _load(options: argparse.Namespace) -> Any:
    from edgeprune import api
    from edgeprune.graph.load import parse_input

    shapes = parse_input(options.input) if options.input else None
    return api.load(options.model, input_shapes=shapes, factory=options.factory, trust=options.trust)


def _compress(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
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


def _redesign(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
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


def _rebuild(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api

    network = api.rebuild(_load(options), options.plan, options.out, seed=options.seed)
    count = sum(p.numel() for p in network.module.parameters())
    return {"path": options.out, "params": count}, f"{options.out}: {count} parameters, random weights"


def _folder(model: str, latency: str) -> str:
    """MODEL-BUDGET beside the model."""
    path = Path(model)
    return str(path.with_name(f"{path.stem}-{latency.strip().replace('%', 'pct')}"))


def _profile(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api
    from edgeprune.progress import Progress

    network = _load(options) if options.model else None
    result = api.profile(network, target=options.target, threads=options.threads, on=options.on, progress=Progress())
    return result.to_dict(), result.text()


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
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


def _export(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api

    out = options.out or str(Path(options.model).with_suffix(".onnx"))
    if not options.out and Path(out).exists():
        raise UsageError(
            f"{out} is there already; say where to write: edgeprune export {options.model} --out FILE.onnx"
        )
    result = api.export(_load(options), out)
    return result.to_dict(), result.text()


def _inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api
    from edgeprune.progress import Progress

    result = api.inspect(
        _load(options), target=options.target, threads=options.threads, on=options.on, progress=Progress()
    )
    return result.to_dict(), result.text()


def _targets(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from edgeprune import api

    if options.action == "fetch":
        folder = api.fetch(options.name or "web-wasm", options.archive)
        return {"path": str(folder)}, f"{folder}: ready"
    found = api.targets()
    width = max(len(t["name"]) for t in found)
    lines = [f"{t['name']:<{width}}  {t['summary']}  ({t['path']})" for t in found]
    return {"targets": found}, "\n".join(lines)


def _methods(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
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
    return {"methods": found}, "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
