"""The command line: parse, one command, print."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from edgeprune import __version__, commands
from edgeprune.errors import EdgepruneError

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
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_compress(verbs)
    _add_profile(verbs)
    _add_redesign(verbs)
    _add_rebuild(verbs)
    _add_measure(verbs)
    _add_export(verbs)
    _add_inspect(verbs)
    _add_targets(verbs)
    _add_methods(verbs)
    _add_doctor(verbs)
    return parser


def _command(verbs: Any, name: str, run: Any, help_text: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
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


def _target_options(parser: argparse.ArgumentParser, default: str | None = "cpu") -> None:
    told = f"default: {default or 'all'}; see `edgeprune targets`"
    parser.add_argument("--target", default=default, help=f"a target file's name ({told})")
    parser.add_argument("--threads", type=int, help="override the target's number of threads")
    parser.add_argument("--on", metavar="HOST[,HOST]", help="measure there, through ssh; several hosts share the work")
    parser.add_argument(
        "--listen", dest="on", metavar="ADDRESS[:PORT]", help="of a browser target: serve its page on this address"
    )


def _add_compress(verbs: Any) -> None:
    parser = _command(
        verbs, "compress", commands.compress, "shrink a network until its measured latency is within a budget",
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


def _add_profile(verbs: Any) -> None:
    parser = _command(
        verbs, "profile", commands.profile, "measure a target's latency table, or what a model still lacks in it",
        "edgeprune profile --target cpu --model model.pt2",
    )  # fmt: skip
    _model_options(parser, positional=False)
    _target_options(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="measure some of the table's kernels again: is it still true?",
    )


def _add_redesign(verbs: Any) -> None:
    parser = _command(
        verbs, "redesign", commands.redesign,
        "widen a network inside, train, and compress it back to the latency it had",
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


def _add_rebuild(verbs: Any) -> None:
    parser = _command(
        verbs, "rebuild", commands.rebuild, "make a fresh network of the form that redesign or compress found",
        "edgeprune rebuild model.pt2 out/redesign.json --out fresh.pt2",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("plan", metavar="PLAN.json", help="redesign.json, or the plan.json of compress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="FILE.pt2")


def _add_measure(verbs: Any) -> None:
    parser = _command(
        verbs, "measure", commands.measure, "time ONNX files against each other, interleaved",
        "edgeprune measure original.onnx out/model.onnx",
    )  # fmt: skip
    parser.add_argument("files", nargs="+", metavar="FILE.onnx", help="one file, or two to compare")
    _target_options(parser)
    parser.add_argument("--rounds", type=int, default=40, help="interleaved rounds (default: 40)")


def _add_export(verbs: Any) -> None:
    parser = _command(
        verbs, "export", commands.export, "write the dense ONNX file of a network, such as a retrained .pt2",
        "edgeprune export out/model.pt2 --out model.onnx",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("--out", metavar="FILE.onnx", help="(default: MODEL with .onnx)")


def _add_inspect(verbs: Any) -> None:
    parser = _command(
        verbs, "inspect", commands.inspect, "show a network's nodes, channel groups and kernels with their latency",
        "edgeprune inspect model.pt2",
    )  # fmt: skip
    _model_options(parser)
    _target_options(parser)


def _add_targets(verbs: Any) -> None:
    parser = _command(
        verbs, "targets", commands.targets, "list the known targets, or fetch what one needs", "edgeprune targets"
    )
    parser.add_argument("action", nargs="?", choices=["list", "fetch"], default="list", help="(default: list)")
    parser.add_argument("name", nargs="?", metavar="TARGET", help="of fetch: a browser target, such as web-wasm")
    parser.add_argument("--from", dest="archive", metavar="FILE.tgz", help="of fetch: the npm package, fetched already")


def _add_doctor(verbs: Any) -> None:
    parser = _command(
        verbs, "doctor", commands.doctor, "look at the targets: what was found, what is missing, what mends it",
        "edgeprune doctor --target cpu",
    )  # fmt: skip
    _target_options(parser, default=None)


def _add_methods(verbs: Any) -> None:
    _command(
        verbs, "methods", commands.methods, "list what --method and --planner can be, and what each needs and costs",
        "edgeprune methods",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
