"""A model file becomes a Network. The file is recognised by what it holds, never by its name.

    torch.export archive   read by exported.py; knows its input shapes
    TorchScript archive    read by torchscript.py; a traced one knows its input shapes
    state_dict             weights only: a factory named by the user builds the network
    pickled nn.Module      loading one runs code out of the file, so it is refused unless the user trusts it
    ONNX                   recognised, not supported as a network to compress

Nothing of the file is ever executed without ``trust``: no pickle runs, no torch loader sees the file, operators and
names are checked against whitelists. Sizes are checked before memory is taken. Whatever is wrong with a file ends in
one EdgepruneError of one line.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.errors import EdgepruneError, ModelFileError, UnsupportedModelError, UsageError
from edgeprune.graph.archive import MAX_FILE_BYTES, Archive
from edgeprune.graph.exported import is_exported, read_exported
from edgeprune.graph.factory import build, fill
from edgeprune.graph.lift import lift, lift_graph, rename_inputs
from edgeprune.graph.network import Network, shapes
from edgeprune.graph.pickled import Thing, load_legacy, unpickle
from edgeprune.graph.recognise import describe, looks_like_onnx
from edgeprune.graph.storage import stored_tensors
from edgeprune.graph.torchscript import ScriptNet, is_torchscript, read_torchscript, traced_shapes
from edgeprune.graph.trace import export, quiet

_NESTS = ("state_dict", "model_state_dict", "model", "net", "module", "params", "weights", "ema", "model_ema")
_MAX_INPUT_VALUES = 1 << 28
_FORMATS = "torch.export.save, torch.jit.save, or torch.save of a state_dict (with --factory)"

Shapes = Sequence[Sequence[int]]


def load(
    path: str | Path, *, input_shapes: Shapes | None = None, factory: str | None = None, trust: bool = False
) -> Network:
    """Read a model file of any supported kind (see the module's docstring).

    input_shapes: one shape per input, batch in front (any value), for files that do not know theirs
    factory:      ``package.module:function`` or ``file.py:function``, called without arguments, returns the nn.Module
                  that a state_dict belongs to. This runs the named code, not code of the file.
    trust:        open pickled modules with ``torch.load(weights_only=False)``, which runs whatever the file says

    Raises ModelFileError (the file cannot be read, or is refused), UsageError (an input shape or factory is needed or
    wrong), UnsupportedModelError (read, but not a network edgeprune can work on).
    """
    path = Path(path)
    given = None if input_shapes is None else _checked_shapes(input_shapes)
    try:
        return _run_once(_load(path, given, factory, trust))
    except EdgepruneError as error:
        raise type(error)(_one_line(str(error), path)) from error
    except RecursionError as error:
        raise ModelFileError(f"{path}: nested too deeply; expected a file of {_FORMATS}") from error
    except MemoryError as error:
        raise ModelFileError(f"{path}: claims more memory than there is; expected a file of {_FORMATS}") from error
    except Exception as error:  # a damaged file can go wrong anywhere; none of it may reach the user as a traceback
        reason = " ".join(str(error).split())[:160]
        raise ModelFileError(
            f"{path}: damaged, or not a model ({type(error).__name__}: {reason}); expected a file of {_FORMATS}"
        ) from error


def parse_input(text: str) -> tuple[tuple[int, ...], ...]:
    """``1x3x224x224`` or ``1x3x224x224,1x4`` -> shapes, one per input. Raises UsageError."""
    try:
        return _checked_shapes([[int(d) for d in part.lower().split("x")] for part in text.split(",")])
    except ValueError:
        raise UsageError(f"--input {text!r}: expected sizes like 1x3x224x224, inputs separated by commas") from None


def save(network: Network, path: str | Path) -> None:
    """Write the network as a ``torch.export`` archive, batch (and height and width where possible) dynamic.

    ``torch.export.load(path).module()`` is the torch module again, under the same weight names and ready for training;
    ``load(path)`` is the network again. Raises UnsupportedModelError when it cannot be exported.
    """
    program = export(network.module, network.input_shapes, network.origin)
    for node in program.graph.nodes:  # where a line of someone's code lay is nobody's business
        node.meta.pop("stack_trace", None)
    path = Path(path)
    with path.open("wb") as file, quiet():
        torch.export.save(program, file)


def _load(path: Path, given: tuple[tuple[int, ...], ...] | None, factory: str | None, trust: bool) -> Network:
    head, size = _head(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06")):
        with Archive.open(path) as archive:
            if is_exported(archive):
                graph, own, baked = read_exported(archive, str(path))
                return lift_graph(graph, _agreeing(given, own, path), str(path), baked)
            if is_torchscript(archive):
                return _scripted(archive, path, given)
            if "data.pkl" not in archive:
                raise ModelFileError(f"{path}: a zip archive, but no model; expected a file of {_FORMATS}")
            read = archive.read
            content = unpickle(read("data.pkl"), stored_tensors(lambda key: read(f"data/{key}", MAX_FILE_BYTES)))
    elif head[:1] == b"\x80":
        content = load_legacy(path)
    elif looks_like_onnx(path, size):
        raise ModelFileError(
            f"{path}: an ONNX model, which can be measured but not compressed yet; expected a file of {_FORMATS}"
        )
    else:
        raise ModelFileError(f"{path}: {describe(head)}; expected a file of {_FORMATS}")
    return _from_content(content, path, given, factory, trust)


def _scripted(archive: Archive, path: Path, given: tuple[tuple[int, ...], ...] | None) -> Network:
    model = read_torchscript(archive, str(path))
    if given is None and (own := traced_shapes(archive)) is not None:
        given = _checked_shapes(own)
    if given is not None:
        model.rehearse(given)
    network = _lifted(model, given, str(path))
    rename_inputs(network.module, model.input_names())
    return network


def _head(path: Path) -> tuple[bytes, int]:
    try:
        if not path.exists():
            raise ModelFileError(f"{path}: no such file")
        if not path.is_file():
            raise ModelFileError(f"{path}: not a file; expected a file of {_FORMATS}")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error})") from error
    if not head:
        raise ModelFileError(f"{path}: the file is empty")
    if size > MAX_FILE_BYTES:
        raise ModelFileError(f"{path}: {size / 2**30:.1f} GiB; edgeprune reads models up to {MAX_FILE_BYTES >> 30} GiB")
    return head, size


def _from_content(
    content: Any, path: Path, given: tuple[tuple[int, ...], ...] | None, factory: str | None, trust: bool
) -> Network:
    """What a pickle holds: weights, or an object that only its own code can bring to life."""
    stranger = _stranger(content)
    weights = None if stranger else _weights(content)
    if weights is None:
        if stranger is None:
            raise ModelFileError(f"{path}: a {type(content).__name__} without tensors; expected a file of {_FORMATS}")
        if not trust:
            raise ModelFileError(
                f"{path}: a pickled object ({stranger}), and unpickling it runs code out of the file; where you trust "
                f"it, convert it with: {_conversion(path, given)} - or open it here with --trust"
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=False)
        except (ImportError, AttributeError) as error:
            raise ModelFileError(
                f"{path}: its code cannot be imported ({error}); say where it lies: PYTHONPATH=FOLDER edgeprune ..."
            ) from error
        module = _module(content)
        if module is not None:
            return _lifted(module, given, str(path))
        weights = _weights(content)
        if weights is None:
            raise ModelFileError(f"{path}: holds a {type(content).__name__}, neither an nn.Module nor weights")
    if factory is None:
        raise UsageError(
            f"{path}: holds weights only ({len(weights)} tensors, {next(iter(weights))} first); name what builds the "
            "network: --factory package.module:function or --factory file.py:function"
        )
    module = build(factory)
    fill(module, weights, path, factory)
    return _lifted(module, given, str(path))


def _weights(content: Any, nested: bool = True) -> dict[str, torch.Tensor] | None:
    """The tensors of a state_dict, or of the one inside a training checkpoint."""
    if not isinstance(content, dict):
        return None
    if content and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        return content
    for key in _NESTS if nested else ():
        found = _weights(content.get(key), nested=False)
        if found is not None:
            return found
    return None


def _stranger(content: Any) -> str | None:
    """The name of the class or function without which the content means nothing; None for weights."""
    if isinstance(content, dict):
        if _weights(content) is not None:
            return None
        inner = [content.get(key) for key in _NESTS] + list(content.values())
        content = next((v for v in inner if getattr(v, "name", None) and not isinstance(v, torch.Tensor)), None)
        for value in inner:
            if content is None and isinstance(value, dict):
                content = next((v for v in value.values() if isinstance(v, Thing)), None)
    name = getattr(content, "name", None)
    return str(name)[:80] if isinstance(name, str) and not isinstance(content, torch.Tensor) else None


def _module(content: Any) -> nn.Module | None:
    if isinstance(content, dict):
        content = next((content[k] for k in _NESTS if isinstance(content.get(k), nn.Module)), None)
    return content if isinstance(content, nn.Module) else None


def _conversion(path: Path, given: tuple[tuple[int, ...], ...] | None) -> str:
    shape = ", ".join(map(str, (2, *given[0][1:]) if given else (2, 3, 224, 224)))
    code = (
        f"import torch; m = torch.load({str(path)!r}, weights_only=False).eval(); "
        f"d = {{0: torch.export.Dim.AUTO}}; torch.export.save(torch.export.export(m, (torch.randn({shape}),), "
        f"dynamic_shapes=(d,)), {path.stem + '.pt2'!r})"
    )
    return "python -c " + (shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"')


def _one_line(text: str, path: Path) -> str:
    """Names out of the file may hold anything: line breaks and control characters go."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if str(path) in text else f"{path}: {text}"


def _lifted(module: nn.Module, given: tuple[tuple[int, ...], ...] | None, origin: str) -> Network:
    if given is None:
        raise UsageError(f"{origin}: does not say which input it takes; name it, for example --input 1x3x224x224")
    return lift(module, given, origin, strict=not isinstance(module, ScriptNet))


def _agreeing(
    given: tuple[tuple[int, ...], ...] | None, own: list[tuple[int, ...]], path: Path
) -> Sequence[Sequence[int]]:
    """The user's input shapes if they are given and fit the file's, else the file's."""
    if given is None:
        try:
            return _checked_shapes(own)
        except UsageError as error:
            raise ModelFileError(f"{path}: its own {error}") from error
    if [len(s) for s in given] != [len(s) for s in own]:
        shown = ",".join("x".join(map(str, s)) for s in own)
        raise UsageError(f"{path}: takes input {shown}, and --input says otherwise; leave it out")
    return given


def _checked_shapes(input_shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    result = tuple((1, *(int(d) for d in shape[1:])) for shape in input_shapes)
    for shape, original in zip(result, input_shapes, strict=True):
        values = 1
        for d in shape:
            values *= d
        if len(original) < 2 or min(shape) < 1 or values > _MAX_INPUT_VALUES:
            raise UsageError(f"input shape {'x'.join(map(str, original))}: expected sizes like 1x3x224x224")
    if not result:
        raise UsageError("a network needs at least one input; expected sizes like 1x3x224x224")
    return result


def _run_once(network: Network) -> Network:
    """Run it on shapes alone: what does not fit together is found here, and not somewhere in the middle."""
    try:
        shapes(network, batch=3)
    except EdgepruneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        shown = ",".join("x".join(map(str, s)) for s in network.input_shapes)
        raise UnsupportedModelError(
            f"{network.origin}: does not run at input {shown} with a batch of 3: {reason}"
        ) from error
    return network
