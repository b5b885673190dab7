"""``torch.export`` as edgeprune needs it: eval mode, single precision, as many dynamic sizes as possible."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from edgeprune.errors import EdgepruneError, UnsupportedModelError

OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)
_MAX_FORMULA = 20  # operations in the formula of a size: plain strides and halvings stay below 5


class UnwieldySizesError(Exception):
    """A size became a long formula of the input's, as "same" padding makes it: minutes of symbolic arithmetic ahead."""


def refuse_unwieldy(size: Any) -> None:
    """Raise UnwieldySizesError for a symbolic size of many operations, so that height and width become fixed."""
    if isinstance(size, (torch.SymInt, torch.SymFloat)) and size.node.expr.count_ops() > _MAX_FORMULA:
        raise UnwieldySizesError("sizes become unwieldy formulas")


def export(
    module: nn.Module, shapes: Sequence[Sequence[int]], origin: str, strict: bool = True
) -> torch.export.ExportedProgram:
    """Export in eval mode, with batch, height and width dynamic if the model allows it, else the batch only.

    shapes: one per input, batch in front (any value). strict: see ``lift``. The module is left as it was; one that
    holds half or double precision is copied and exported in single precision.
    Raises UnsupportedModelError when the module cannot be traced at these shapes.
    """
    if any(t.dtype in OTHER_FLOATS for t in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).float()
    modes = {child: child.training for child in module.modules()}
    with contextlib.suppress(NotImplementedError):  # an exported module has its mode baked in
        module.eval()
    try:
        with quiet():
            return _first_that_works(module, shapes, origin, strict)
    finally:
        for child, mode in modes.items():
            child.training = mode


def _first_that_works(
    module: nn.Module, shapes: Sequence[Sequence[int]], origin: str, strict: bool
) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    inputs = tuple(torch.randn(2, *shape[1:], device=device) for shape in shapes)
    spatial = tuple({0: auto, **dict.fromkeys(range(2, len(s)), auto)} for s in shapes)
    batch = tuple({0: auto} for _ in shapes)
    error: Exception | None = None
    hooks = [child.register_forward_hook(_watch) for child in module.modules()] if _can_hook(module) else []
    try:
        for dynamic in (spatial, batch):
            for analysed in (False, True) if strict else (False,):
                try:
                    arguments = _by_argument(module, dynamic)
                    return torch.export.export(module, inputs, dynamic_shapes=arguments, strict=analysed)
                except EdgepruneError:
                    raise
                except UnwieldySizesError as e:
                    error = error or e
                    break
                except Exception as e:  # torch.export raises many kinds; the first one is shown
                    error = error or e
    finally:
        for hook in hooks:
            hook.remove()
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    shown = ", ".join("x".join(map(str, s)) for s in shapes)
    raise UnsupportedModelError(f"{origin}: torch.export cannot trace it at input {shown}: {reason}")


def _can_hook(module: nn.Module) -> bool:
    """Hooks would end up in the graph of modules that are a graph already, and those are quick."""
    return not any(isinstance(child, fx.GraphModule) for child in module.modules())


def _watch(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_dynamo_compiling():
        return
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(value, torch.Tensor):
            for size in value.shape:
                refuse_unwieldy(size)


def functional(module: fx.GraphModule, shapes: Sequence[Sequence[int]], origin: str) -> fx.GraphModule:
    """The same flat graph without in-place calls: exported once more and functionalised, in eval mode."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default and node.args[3] is not None:
            node.args = (*node.args[:5], False, *node.args[6:])
        elif "dropout" in str(node.target) and len(node.args) == 3:
            node.args = (*node.args[:2], False)
    module.recompile()
    program = export(module, shapes, origin, strict=False)
    with quiet():
        result = program.run_decompositions({}).module(check_guards=False)
    assert isinstance(result, fx.GraphModule)
    return result


def _by_argument(module: nn.Module, dynamic: tuple[dict[int, Any], ...]) -> Any:
    """``forward(*args)`` wants its dynamic shapes nested once more."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (dynamic,)
    return dynamic


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch logs whole tracebacks about size inequalities it could not solve and then goes on happily."""
    logger = logging.getLogger("torch")
    children = [logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith("torch.")]
    levels = [(log, log.level) for log in (logger, *children)]
    try:
        for log, _ in levels:
            log.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in levels:
            log.setLevel(level)
