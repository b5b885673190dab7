"""Reading what ``torch.jit.save`` writes, without ``torch.jit.load``.

torch's own reader runs ``__setstate__`` methods out of the file, and TorchScript may call operators that write files.
Here the pickled objects are rebuilt as inert modules (pickled.py), the code is walked as data (script_eval.py), and the
walk is exported like any torch module: the result is the network at hand, with the weights under their own paths.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.errors import EdgepruneError, ModelFileError, UnsupportedModelError
from edgeprune.graph.archive import MAX_FILE_BYTES, Archive
from edgeprune.graph.operators import checked_name, checked_path
from edgeprune.graph.pickled import Thing, unpickle
from edgeprune.graph.script_eval import Evaluator
from edgeprune.graph.script_values import leaves
from edgeprune.graph.storage import shapes_only, stored_tensors

_MAX_CODE_BYTES = 4 << 20
_MAX_ATTRIBUTES = 100_000
_SINGLE = (torch.float16, torch.bfloat16, torch.float64)


def is_torchscript(archive: Archive) -> bool:
    return "constants.pkl" in archive and "data.pkl" in archive


def read_torchscript(archive: Archive, origin: str) -> ScriptNet:
    """The model as an nn.Module that walks its code. Raises ModelFileError, UnsupportedModelError."""
    read = archive.read
    content = unpickle(read("data.pkl"), stored_tensors(lambda key: read(f"data/{key}", MAX_FILE_BYTES)))
    if not isinstance(content, Thing) or not content.name.startswith("__torch__."):
        raise ModelFileError(f"{origin}: a TorchScript archive without a module in it; save it with torch.jit.save")
    constants = unpickle(read("constants.pkl"), stored_tensors(lambda key: read(f"constants/{key}", MAX_FILE_BYTES)))
    return ScriptNet(content, tuple(constants), _Sources(archive, origin))


def traced_shapes(archive: Archive) -> list[tuple[int, ...]] | None:
    """The shapes of the inputs that a model was traced with, if the archive says so."""
    if "traced_inputs.pkl" not in archive:
        return None
    inputs = unpickle(archive.read("traced_inputs.pkl"), shapes_only)
    tensors = inputs.get("forward") if isinstance(inputs, dict) else None
    if not isinstance(tensors, list) or not tensors or not all(isinstance(t, torch.Tensor) for t in tensors):
        return None
    return [tuple(t.shape) for t in tensors]


class ScriptObject(nn.Module):
    """One object of the file: parameters, buffers and sub-modules as in any module, the rest in ``_script_plain``."""

    def __init__(self, kind: str):
        super().__init__()
        self._script_kind = kind
        self._script_plain: dict[str, Any] = {}


class ScriptNet(ScriptObject):
    """The whole model. ``forward`` takes the tensors of the script's forward and returns a flat tuple of tensors."""

    def __init__(self, content: Thing, constants: tuple[Any, ...], sources: _Sources):
        super().__init__(content.name)
        self._script = _Script(self, content, constants, sources)
        self.eval()

    def input_names(self) -> list[str]:
        """The script's own names for its inputs (those without a default)."""
        arguments = self._script.method(self, "forward").args
        names = [a.arg for a in arguments.args][1:]
        return [checked_name(n, self._script.origin) for n in names[: len(names) - len(arguments.defaults)]]

    def rehearse(self, shapes: Sequence[Sequence[int]]) -> None:
        """Walk the code once without values: refusals and endless loops show within a second or two, long before
        exporting would get there. Raises what the code itself leads to; what torch says is left to the export."""
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            values: dict[str, torch.Tensor] = {
                n: mode.from_tensor(t) for n, t in (*self.named_parameters(), *self.named_buffers())
            }
            inputs = tuple(torch.empty(2, *shape[1:]) for shape in shapes)
            try:
                torch.func.functional_call(self, values, inputs)
            except (EdgepruneError, RecursionError):
                raise
            except Exception:
                return

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(v for v in leaves(self._script.run(self, args)) if isinstance(v, torch.Tensor))


class _Script:
    """Objects, constants and code of one archive; the ``Library`` of an Evaluator."""

    def __init__(self, root: ScriptObject, content: Thing, constants: tuple[Any, ...], sources: _Sources):
        self.sources = sources
        self.origin = sources.origin
        self.constants = [_single(c) for c in constants]
        self.scalars = {id(c): c.item() for c in self.constants if _is_integer(c)}
        self.made: dict[int, ScriptObject] = {id(content): root}
        self.parameters: dict[int, nn.Parameter] = {}
        self.attributes = 0
        self.fill(root, content)

    def run(self, root: ScriptObject, args: tuple[torch.Tensor, ...]) -> Any:
        return Evaluator(self, self.scalars).call(self.method(root, "forward"), [root, *args])

    def definition(self, path: str) -> ast.FunctionDef | ast.ClassDef:
        return self.sources.definition(path)

    def method(self, target: Any, name: str) -> ast.FunctionDef:
        if isinstance(target, ScriptObject):
            for part in self.kind(target._script_kind).body:
                if isinstance(part, ast.FunctionDef) and part.name == name:
                    return part
        raise ModelFileError(f"{self.origin}: the code of the model calls the unknown method {name[:60]}")

    def attribute(self, target: Any, name: str) -> Any:
        if isinstance(target, ScriptObject):
            if name == "training":
                return False
            for values in (target._modules, target._parameters, target._buffers, target._script_plain):
                if name in values:
                    return values[name]
            for part in self.kind(target._script_kind).body:  # name : Final[int] = 3
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id == name:
                    return None if part.value is None else ast.literal_eval(part.value)
        raise ModelFileError(f"{self.origin}: the code of the model uses the unknown attribute {name[:60]}")

    def constant(self, name: str) -> Any:
        if not name[1:].isdecimal() or int(name[1:]) >= len(self.constants):
            raise ModelFileError(f"{self.origin}: constant {name[:60]} is missing from the archive")
        return self.constants[int(name[1:])]

    def kind(self, path: str) -> ast.ClassDef:
        definition = self.sources.definition(path)
        if not isinstance(definition, ast.ClassDef):
            raise ModelFileError(f"{self.origin}: {path[:80]} is no class in the archive's code")
        return definition

    def fill(self, target: ScriptObject, thing: Thing) -> None:
        definition = self.kind(thing.name)
        if any(isinstance(p, ast.FunctionDef) and p.name == "__setstate__" for p in definition.body):
            raise UnsupportedModelError(
                f"{self.origin}: {thing.name[:80]} restores itself by code of the file (__setstate__), which is never "
                "run; packed and quantised modules are not supported"
            )
        if not isinstance(thing.state, dict):
            raise ModelFileError(f"{self.origin}: {thing.name[:80]} has no attributes in the archive")
        parameters = _declared(definition, "__parameters__")
        for name, value in thing.state.items():
            checked_path(str(name).replace(".", "!"), self.origin)
            if isinstance(value, torch.Tensor):
                tensor = _single(value)
                if name in parameters and tensor.is_floating_point():
                    target._parameters[name] = self.parameter(tensor)
                else:
                    target._buffers[name] = tensor
            elif isinstance(value, Thing):
                target._modules[name] = self.object(value)
            else:
                target._script_plain[name] = self.plain(value)

    def parameter(self, tensor: torch.Tensor) -> nn.Parameter:
        """One tensor under two names (tied weights) is one parameter."""
        return self.parameters.setdefault(id(tensor), nn.Parameter(tensor))

    def object(self, thing: Thing) -> ScriptObject:
        if id(thing) not in self.made:
            if not thing.name.startswith("__torch__."):
                raise UnsupportedModelError(f"{self.origin}: an object of class {thing.name[:80]} is not supported")
            made = self.made[id(thing)] = ScriptObject(thing.name)
            self.fill(made, thing)
        return self.made[id(thing)]

    def plain(self, value: Any) -> Any:
        self.attributes += 1
        if self.attributes > _MAX_ATTRIBUTES:
            raise ModelFileError(f"{self.origin}: more than {_MAX_ATTRIBUTES} attributes; that is no model")
        if isinstance(value, Thing):
            return self.object(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.plain(v) for v in value)
        if isinstance(value, dict):
            return {k: self.plain(v) for k, v in value.items()}
        return _single(value)


class _Sources:
    """The code members of an archive, parsed on demand."""

    def __init__(self, archive: Archive, origin: str):
        self.origin = origin
        names = [n for n in archive.names if n.startswith("code/") and n.endswith(".py")]
        self._texts: dict[str, bytes] = {}
        total = 0
        for name in names:
            self._texts[name[len("code/") : -len(".py")]] = text = archive.read(name, _MAX_CODE_BYTES)
            total += len(text)
            if total > _MAX_CODE_BYTES:
                raise ModelFileError(f"{origin}: more than {_MAX_CODE_BYTES >> 20} MiB of code; that is no model")
        self._parsed: dict[str, dict[str, ast.FunctionDef | ast.ClassDef]] = {}

    def definition(self, path: str) -> ast.FunctionDef | ast.ClassDef:
        """A function or class by its full name, ``__torch__.package.module.Name``."""
        folder, _, name = path.rpartition(".")
        member = folder.replace(".", "/")
        if member not in self._parsed:
            self._parsed[member] = self._parse(member)
        found = self._parsed[member].get(name)
        if found is None:
            raise ModelFileError(f"{self.origin}: {path[:80]} is missing from the archive's code; save the model again")
        return found

    def _parse(self, member: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
        if member not in self._texts:
            raise ModelFileError(f"{self.origin}: code/{member[:80]}.py is missing from the archive; save it again")
        try:
            tree = ast.parse(self._texts[member])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ModelFileError(f"{self.origin}: code/{member[:80]}.py is not TorchScript ({error})") from error
        return {d.name: d for d in tree.body if isinstance(d, (ast.FunctionDef, ast.ClassDef))}


def _declared(definition: ast.ClassDef, name: str) -> set[str]:
    for part in definition.body:
        if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name) and part.targets[0].id == name:
            return {str(v) for v in ast.literal_eval(part.value)}
    return set()


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point()


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _SINGLE else value
