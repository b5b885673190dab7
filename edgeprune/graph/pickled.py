"""Reading a pickle without running it: what torch writes is rebuilt, everything else becomes an inert stand-in.

A pickle is a small program that may call any importable function. Here its opcodes are walked by hand: lists, dicts
and tensors are built, a handful of torch's own functions (the ones that rebuild tensors) are imitated, and any other
class or function is kept as a ``Global`` or ``Thing`` that only remembers its name. Nothing is imported or called.

Formats: the ``data.pkl`` of torch's zip archives (state_dicts, modules, TorchScript), and the sequence of five pickles
and raw storages that torch wrote before 1.6.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import ModelFileError
from edgeprune.graph.archive import MAX_TEXT_BYTES
from edgeprune.graph.storage import DTYPES, MakeTensor, Storage, shapes_only, stored_tensors

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_OPCODES = 500_000  # a tensor takes about fifty

_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
_STORAGES["torch.storage.UntypedStorage"] = torch.uint8
_STORAGES["torch.UntypedStorage"] = torch.uint8
_DTYPE_GLOBALS = {str(dtype): dtype for dtype in DTYPES.values()}
_LISTS = {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function of the file, by name only."""

    name: str


@dataclass(slots=True, eq=False)
class Thing:
    """What calling a Global would have made: its name, what it was called with, and its state."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


def unpickle(stream: bytes | io.BytesIO, make: MakeTensor) -> Any:
    """The object of the next pickle in the stream, without running anything (see the module's docstring).

    Raises ModelFileError for opcodes that torch never writes, and ValueError, IndexError, KeyError or TypeError for a
    damaged stream.
    """
    return _Machine(make).run(stream)


def load_legacy(path: Path) -> Any:
    """The object of a file that ``torch.save`` wrote before 1.6 (or with _use_new_zipfile_serialization=False)."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_TEXT_BYTES))
        if unpickle(head, shapes_only) != LEGACY_MAGIC or unpickle(head, shapes_only) != _LEGACY_PROTOCOL:
            raise ModelFileError(f"{path}: a pickle, but not one that torch.save wrote; save the model's state_dict")
        info = unpickle(head, shapes_only)
        if not isinstance(info, dict) or not info.get("little_endian", True):
            raise ModelFileError(f"{path}: written on a big-endian machine, which is not supported")
        start = head.tell()
        found: dict[str, Storage] = {}

        def note(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
            found[storage.key] = storage
            return shapes_only(storage, offset, size, stride)

        unpickle(head, note)
        keys = unpickle(head, shapes_only)
        file.seek(head.tell())
        remaining = path.stat().st_size - head.tell()
        contents: dict[str, bytes] = {}
        for key in keys:
            (numel,) = struct.unpack("<q", file.read(8))
            remaining -= 8
            size_bytes = numel * found[key].dtype.itemsize
            if not 0 <= size_bytes <= remaining:
                raise ModelFileError(f"{path}: storage {key} claims {numel} values, more than the file holds")
            contents[key] = file.read(size_bytes)
            remaining -= size_bytes
        head.seek(start)
        return unpickle(head, stored_tensors(contents.__getitem__))


_MARK = object()


class _Machine:
    """The pickle machine, reduced to building data. One method per kind of opcode, named as in ``pickletools``."""

    def __init__(self, make: MakeTensor):
        self.make = make
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: bytes | io.BytesIO) -> Any:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_OPCODES:
                raise ModelFileError("a pickle of more than half a million steps; that is no model")
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSH_ARG:
                self.stack.append(arg)
            elif name in _PUSH:
                self.stack.append(_PUSH[name]())
            else:
                step = getattr(self, f"op_{_ALIASES.get(name, name).lower()}", None)
                if step is None:
                    raise ModelFileError(f"pickle opcode {name}, which torch never writes")
                step(arg)
        raise ValueError("the pickle has no end")

    def pop_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("the pickle has no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def op_proto(self, arg: Any) -> None:
        pass

    def op_mark(self, arg: Any) -> None:
        self.stack.append(_MARK)

    def op_pop(self, arg: Any) -> None:
        self.stack.pop()

    def op_tuple(self, arg: Any) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def op_list(self, arg: Any) -> None:
        self.stack.append(self.pop_mark())

    def op_dict(self, arg: Any) -> None:
        items = self.pop_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def op_frozenset(self, arg: Any) -> None:
        self.stack.append(frozenset(self.pop_mark()))

    def _take(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("the pickle's stack is empty")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def op_tuple1(self, arg: Any) -> None:
        self._take(1)

    def op_tuple2(self, arg: Any) -> None:
        self._take(2)

    def op_tuple3(self, arg: Any) -> None:
        self._take(3)

    def op_append(self, arg: Any) -> None:
        self._extend([self.stack.pop()])

    def op_appends(self, arg: Any) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(items)
        else:
            (target.items if isinstance(target, Thing) else target).extend(items)

    def op_setitem(self, arg: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def op_setitems(self, arg: Any) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, Thing):
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        else:
            raise ValueError("the pickle sets items of something that is no dict")

    def op_get(self, arg: Any) -> None:
        self.stack.append(self.memo[arg])

    def op_put(self, arg: Any) -> None:
        self.memo[arg] = self.stack[-1]

    def op_memoize(self, arg: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_global(self, arg: Any) -> None:
        self.stack.append(_known(".".join(str(arg).split(" "))))

    def op_stack_global(self, arg: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_known(f"{module}.{name}"))

    def op_binpersid(self, arg: Any) -> None:
        kind, storage, key, _, numel, *_ = self.stack.pop()
        dtype = _STORAGES.get(storage.name) if isinstance(storage, Global) else None
        if kind != "storage" or dtype is None or not isinstance(numel, int):
            raise ModelFileError(f"a tensor of unknown storage {getattr(storage, 'name', storage)!r}")
        self.stack.append(Storage(str(key), dtype, numel))

    def op_reduce(self, arg: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(function, tuple(args)))

    def op_newobj_ex(self, arg: Any) -> None:
        _, args, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self._call(kind, tuple(args)))

    def op_obj(self, arg: Any) -> None:
        kind, *args = self.pop_mark()
        self.stack.append(self._call(kind, tuple(args)))

    def op_inst(self, arg: Any) -> None:
        args = self.pop_mark()
        self.stack.append(self._call(Global(".".join(str(arg).split(" "))), tuple(args)))

    def op_build(self, arg: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Thing):
            target.state = state

    def _call(self, function: Any, args: tuple[Any, ...]) -> Any:
        name = getattr(function, "name", None)
        if not isinstance(name, str):
            raise ValueError("the pickle calls something that is no function")
        if name == "collections.OrderedDict":
            return dict(*args)
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            storage, offset, size, stride = args[:4]
            if not isinstance(storage, Storage):
                raise ValueError("a tensor without storage")
            return self.make(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return args[0]
        if name == "torch._tensor._rebuild_from_type_v2":
            return self._call(args[0], tuple(args[2]))
        if name in _LISTS:
            return list(args[0])
        if name == "torch.jit._pickle.restore_type_tag":
            return args[0]
        if name == "torch.Size":
            return tuple(args[0])
        return Thing(name, args)


def _known(name: str) -> Any:
    return _DTYPE_GLOBALS.get(name) or Global(name)


_PUSH_ARG_TEXT = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
"""
_PUSH_ARG = frozenset(_PUSH_ARG_TEXT.split())
_PUSH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_ALIASES = {
    "FRAME": "PROTO",
    "BINGET": "GET",
    "LONG_BINGET": "GET",
    "BINPUT": "PUT",
    "LONG_BINPUT": "PUT",
    "NEWOBJ": "REDUCE",
    "ADDITEMS": "APPENDS",
}
