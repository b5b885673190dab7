"""Walking serialised TorchScript code, statement by statement, as plain data.

TorchScript is stored as source in a small subset of Python. It is parsed with ``ast`` (never compiled) and walked here;
whatever it may call is listed in script_builtins.py, so the code can do arithmetic on its inputs and nothing else.
Run under ``torch.export``, the walk leaves the graph: branches and loops over shapes unroll as they would in eager
torch.

A budget of steps bounds the walk: real networks take some ten thousand, a loop that never ends is stopped.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from edgeprune.errors import ModelFileError, UnsupportedModelError
from edgeprune.graph.script_builtins import call_prim, call_torch
from edgeprune.graph.script_values import to_bool, to_float, to_int

MAX_STEPS = 300_000
MAX_CALLS = 5_000  # of operators: each takes milliseconds while being exported
MAX_DEPTH = 60


@dataclass(frozen=True, slots=True)
class Name:
    """A dotted name that is not a value yet: ``torch.conv2d``, ``__torch__.torch.nn.functional.relu``."""

    path: str


class Library(Protocol):
    """What the code refers to: its own functions and classes, and the objects of the file."""

    origin: str

    def definition(self, path: str) -> ast.FunctionDef | ast.ClassDef: ...
    def method(self, target: Any, name: str) -> ast.FunctionDef: ...
    def attribute(self, target: Any, name: str) -> Any: ...
    def constant(self, name: str) -> Any: ...


_ROOTS = frozenset(("torch", "ops", "__torch__", "CONSTANTS"))
_NO_VALUE = object()


class Evaluator:
    """One run. ``scalars`` as in ``call_torch``."""

    def __init__(self, library: Library, scalars: dict[int, Any]):
        self.library = library
        self.scalars = scalars
        self.origin = library.origin
        self.steps = 0
        self.calls = 0
        self.depth = 0
        self.written: dict[tuple[int, str], Any] = {}  # attributes that the code itself assigns

    def call(self, function: ast.FunctionDef, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> Any:
        names = [a.arg for a in function.args.args]
        variables = dict(zip(names, args, strict=False))
        variables.update(kwargs or {})
        defaults = dict(zip(names[len(names) - len(function.args.defaults) :], function.args.defaults, strict=True))
        for name in names:
            if name not in variables:
                if name not in defaults:
                    raise ModelFileError(f"{self.origin}: {function.name} is called without its argument {name}")
                variables[name] = self.value(defaults[name], {})
        if len(args) > len(names) or self.depth >= MAX_DEPTH:
            raise ModelFileError(f"{self.origin}: calls of {function.name} do not fit or nest without end")
        self.depth += 1
        try:
            result = self.block(function.body, variables)
        finally:
            self.depth -= 1
        return None if result is _NO_VALUE else result

    def block(self, statements: list[ast.stmt], variables: dict[str, Any]) -> Any:
        """The value of a return statement met, else _NO_VALUE."""
        for statement in statements:
            result = self.statement(statement, variables)
            if result is not _NO_VALUE:
                return result
        return _NO_VALUE

    def statement(self, node: ast.stmt, variables: dict[str, Any]) -> Any:
        self.count()
        if isinstance(node, ast.Assign):
            self.assign(node.targets[0], self.value(node.value, variables), variables)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.assign(node.target, self.value(node.value, variables), variables)
        elif isinstance(node, ast.Expr):
            self.value(node.value, variables)
        elif isinstance(node, ast.Return):
            return None if node.value is None else self.value(node.value, variables)
        elif isinstance(node, ast.If):
            chosen = node.body if to_bool(self.value(node.test, variables)) else node.orelse
            return self.block(chosen, variables)
        elif isinstance(node, ast.While):
            while to_bool(self.value(node.test, variables)):
                self.count()
                result = self.block(node.body, variables)
                if result is not _NO_VALUE:
                    return result
        elif isinstance(node, ast.For):
            return self.loop(node, variables)
        elif not isinstance(node, ast.Pass):
            raise UnsupportedModelError(
                f"{self.origin}: TorchScript statement {type(node).__name__} is not supported; trace the model instead"
            )
        return _NO_VALUE

    def loop(self, node: ast.For, variables: dict[str, Any]) -> Any:
        call = node.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"):
            raise UnsupportedModelError(f"{self.origin}: a TorchScript loop over something other than a range")
        for index in range(*(int(self.value(a, variables)) for a in call.args)):
            self.count()
            self.assign(node.target, index, variables)
            result = self.block(node.body, variables)
            if result is not _NO_VALUE:
                return result
        return _NO_VALUE

    def count(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ModelFileError(f"{self.origin}: the code of the model does not come to an end")

    def assign(self, target: ast.expr, value: Any, variables: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            variables[target.id] = value
        elif isinstance(target, ast.Attribute):
            self.written[id(self.value(target.value, variables)), target.attr] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part, item in zip(target.elts, value, strict=True):
                self.assign(part, item, variables)
        else:
            raise UnsupportedModelError(f"{self.origin}: a TorchScript assignment of an unknown kind")

    def value(self, node: ast.expr, variables: dict[str, Any]) -> Any:
        self.count()
        if isinstance(node, ast.Name):
            return self.name(node.id, variables)
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute):
            return self.attribute(self.value(node.value, variables), node.attr)
        if isinstance(node, ast.Call):
            return self.called(node, variables)
        if isinstance(node, ast.List):
            return [self.value(e, variables) for e in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self.value(e, variables) for e in node.elts)
        if isinstance(node, ast.Subscript):
            return self.value(node.value, variables)[self.value(node.slice, variables)]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand, variables)
        if isinstance(node, ast.Dict):
            keys = [self.value(k, variables) for k in node.keys if k is not None]
            return dict(zip(keys, (self.value(v, variables) for v in node.values), strict=True))
        raise UnsupportedModelError(
            f"{self.origin}: TorchScript expression {type(node).__name__} is not supported; trace the model instead"
        )

    def name(self, name: str, variables: dict[str, Any]) -> Any:
        if name in variables:
            return variables[name]
        if name in _ROOTS:
            return Name(name)
        if name in ("inf", "nan"):
            return math.inf if name == "inf" else math.nan
        raise ModelFileError(f"{self.origin}: the code of the model uses the unknown name {name[:60]}")

    def attribute(self, target: Any, name: str) -> Any:
        if isinstance(target, Name):
            if target.path == "CONSTANTS":
                return self.library.constant(name)
            return Name(f"{target.path}.{name}")
        if (id(target), name) in self.written:
            return self.written[id(target), name]
        return self.library.attribute(target, name)

    def called(self, node: ast.Call, variables: dict[str, Any]) -> Any:
        function = node.func
        if isinstance(function, ast.Name) and function.id not in variables and function.id in _FORMS:
            return _FORMS[function.id](self, node, variables)
        method = None
        if isinstance(function, ast.Attribute):
            target = self.value(function.value, variables)
            if isinstance(target, Name):
                callee: Any = self.attribute(target, function.attr)
            else:
                method = self.library.method(target, function.attr)
        else:
            callee = self.value(function, variables)
        args = [self.value(a, variables) for a in node.args]
        kwargs = {str(k.arg): self.value(k.value, variables) for k in node.keywords}
        if method is not None:
            return self.call(method, [target, *args], kwargs)
        if not isinstance(callee, Name):
            raise ModelFileError(f"{self.origin}: the code of the model calls something that is no function")
        return self.call_name(callee.path, args, kwargs)

    def call_name(self, path: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        space, _, name = path.partition(".")
        self.calls += space != "__torch__" and any(isinstance(leaf, torch.Tensor) for leaf in args)
        if self.calls > MAX_CALLS:
            raise ModelFileError(f"{self.origin}: the code of the model does not come to an end")
        if space == "torch" and "." not in name:
            return call_torch(name, args, kwargs, self.scalars, self.origin)
        if space == "__torch__":
            definition = self.library.definition(path)
            if isinstance(definition, ast.FunctionDef):
                return self.call(definition, args, kwargs)
            if any(isinstance(b, ast.Name) and b.id == "NamedTuple" for b in definition.bases):
                return tuple(args)
            raise UnsupportedModelError(
                f"{self.origin}: TorchScript class {path[:80]} is made in forward; not supported"
            )
        kind, _, operation = name.partition(".")
        if space == "ops" and kind == "prim":
            return call_prim(operation, args, self.origin)
        if space == "ops" and kind == "aten":
            return call_torch(operation, args, kwargs, self.scalars, self.origin)
        raise UnsupportedModelError(
            f"{self.origin}: operator {name.replace('.', '::')[:80]} is no ATen operator; custom operators are not "
            "supported, write the model with plain torch operators"
        )


def _second(run: Evaluator, node: ast.Call, variables: dict[str, Any]) -> Any:
    """annotate(T, value) and unchecked_cast(T, value): types are not looked at."""
    return run.value(node.args[1], variables)


def _converted(convert: Callable[[Any], Any]) -> Callable[[Evaluator, ast.Call, dict[str, Any]], Any]:
    def form(run: Evaluator, node: ast.Call, variables: dict[str, Any]) -> Any:
        value = run.value(node.args[0], variables)
        return convert(run.scalars.get(id(value), value))

    return form


def _getattr(run: Evaluator, node: ast.Call, variables: dict[str, Any]) -> Any:
    return run.attribute(run.value(node.args[0], variables), str(run.value(node.args[1], variables)))


_TYPES: dict[str, Any] = {
    "Tensor": torch.Tensor, "int": (int, torch.SymInt), "float": (float, torch.SymFloat), "bool": bool, "str": str,
    "List": list, "Tuple": tuple, "Dict": dict, "NoneType": type(None), "list": list, "tuple": tuple,
}  # fmt: skip


def _isinstance(run: Evaluator, node: ast.Call, variables: dict[str, Any]) -> bool:
    value, kinds = run.value(node.args[0], variables), node.args[1]
    for kind in kinds.elts if isinstance(kinds, (ast.Tuple, ast.List)) else [kinds]:
        name = kind.value if isinstance(kind, ast.Subscript) else kind
        expected = _TYPES.get(name.id) if isinstance(name, ast.Name) else None
        if expected is None:
            raise UnsupportedModelError(f"{run.origin}: a TorchScript isinstance of an unknown type")
        if isinstance(value, expected):
            return True
    return False


_FORMS: dict[str, Callable[[Evaluator, ast.Call, dict[str, Any]], Any]] = {
    "annotate": _second,
    "unchecked_cast": _second,
    "uninitialized": lambda run, node, variables: None,
    "int": _converted(to_int),
    "float": _converted(to_float),
    "bool": _converted(to_bool),
    "str": _converted(lambda value: str(value)[:1000] if isinstance(value, (int, float, str)) else "?"),
    "getattr": _getattr,
    "isinstance": _isinstance,
    "print": lambda run, node, variables: None,
}
