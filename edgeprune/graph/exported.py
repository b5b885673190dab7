"""Reading what ``torch.export.save`` writes, without ``torch.export.load``.

torch's own reader trusts its file: it unpickles sample inputs, evaluates size expressions as Python and resolves
operator names by attribute chains. Here the JSON graph and the raw weight bytes are read instead, operators are looked
up in a whitelist (operators.py), and size expressions, sample inputs and guards are never looked at: input shapes come
from the hints beside the expressions.

Layouts: the archive of torch 2.7 and later (``models/<name>.json``, weights as raw bytes or one pickle), and the one of
2.1 to 2.6 (``serialized_exported_program.json``, weights as one pickle).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from edgeprune.errors import ModelFileError, UnsupportedModelError
from edgeprune.graph.archive import MAX_FILE_BYTES, Archive
from edgeprune.graph.lift import place
from edgeprune.graph.operators import checked_name, checked_path, resolve
from edgeprune.graph.pickled import unpickle
from edgeprune.graph.storage import Storages, stored_tensors

_MAX_NODES = 20_000  # the largest networks have some thousand
_OLD_PROGRAM = "serialized_exported_program.json"
_SCALAR_TYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_CONTEXTS = {f"torch.ops.higher_order.wrap_with_{name}" for name in ("set_grad_enabled", "autocast")}
_LITERALS: dict[str, Callable[[Any], Any]] = {"as_int": int, "as_bool": bool, "as_string": str, "as_float": float}


def is_exported(archive: Archive) -> bool:
    return _OLD_PROGRAM in archive or "archive_format" in archive or any(n.startswith("models/") for n in archive.names)


Flat = tuple[fx.GraphModule, list[tuple[int, ...]], int | None]


def read_exported(archive: Archive, origin: str) -> Flat:
    """The flat graph, the shapes its inputs were exported with, and the batch size if it is fixed (as ``lift_graph``
    takes them).

    Raises ModelFileError for a damaged archive, UnsupportedModelError for a graph that holds more than tensors in,
    allowed ATen operators, tensors out.
    """
    name, program = _program(archive, origin)
    tensors = {**_tensors(archive, name, "weights", origin), **_tensors(archive, name, "constants", origin)}
    return _Builder(program["graph_module"], tensors, origin).build()


def _program(archive: Archive, origin: str) -> tuple[str, dict[str, Any]]:
    if _OLD_PROGRAM in archive:
        return "", json.loads(archive.read(_OLD_PROGRAM))
    models = [n for n in archive.names if n.startswith("models/") and n.endswith(".json")]
    if len(models) != 1:
        if any(n.startswith("data/aotinductor/") for n in archive.names):
            raise ModelFileError(f"{origin}: compiled by AOTInductor, it holds no graph; use torch.export.save instead")
        raise ModelFileError(
            f"{origin}: a torch.export archive with {len(models)} models, expected one; save it with torch.export.save"
        )
    return models[0][len("models/") : -len(".json")], json.loads(archive.read(models[0]))


def _tensors(archive: Archive, name: str, kind: str, origin: str) -> dict[str, torch.Tensor]:
    """kind: weights or constants. Full name -> tensor."""
    folder = f"data/{kind}/"
    config_name = f"{folder}{name}_{kind}_config.json"
    if config_name not in archive:
        old = {"weights": "serialized_state_dict.pt", "constants": "serialized_constants.pt"}[kind]
        pickled = next((n for n in (f"{folder}{name}.pt", old) if n in archive), None)
        if pickled is None:
            raise ModelFileError(f"{origin}: member {config_name} is missing from the archive; save the model again")
        return _pickled_tensors(archive, pickled, origin)
    storages = Storages(lambda path: archive.read(folder + path, MAX_FILE_BYTES))
    result: dict[str, torch.Tensor] = {}
    for full_name, payload in json.loads(archive.read(config_name))["config"].items():
        path, meta = str(payload["path_name"]), payload["tensor_meta"]
        if payload["use_pickle"] or meta is None:
            raise ModelFileError(f"{origin}: {full_name[:80]} is stored as a pickle, not as a plain tensor; refused")
        size, stride = (tuple(_size(s) for s in meta[k]) for k in ("sizes", "strides"))
        offset, dtype = _size(meta["storage_offset"]), _SCALAR_TYPES[meta["dtype"]]
        result[full_name] = storages.tensor(path, dtype, offset, size, stride)
    return result


def _pickled_tensors(archive: Archive, member: str, origin: str) -> dict[str, torch.Tensor]:
    """A zip archive within the archive: torch.save of a dict of tensors."""
    data = archive.read(member, MAX_FILE_BYTES)
    if not data:
        return {}
    with Archive.nested(data, f"{origin}: {member}") as inner:
        values = unpickle(inner.read("data.pkl"), stored_tensors(lambda k: inner.read(f"data/{k}", MAX_FILE_BYTES)))
    if not isinstance(values, dict) or not all(isinstance(v, torch.Tensor) for v in values.values()):
        raise ModelFileError(f"{origin}: {member} holds more than tensors; refused")
    return values


def _size(value: Mapping[str, Any]) -> int:
    """A SymInt: a number, or an expression of which only the hint is read."""
    (kind, content), *_ = value.items()
    if kind == "as_int":
        return int(content)
    hint = content.get("hint")
    if not hint:
        raise ModelFileError("a size in the graph has neither a value nor a hint")
    return int(hint["as_int"])


class _Builder:
    """The JSON graph as an ``fx`` graph on a root module that holds the weights under their own names."""

    def __init__(self, doc: Mapping[str, Any], tensors: dict[str, torch.Tensor], origin: str):
        self.json, self.signature = doc["graph"], doc["signature"]
        self.tensors = tensors
        self.origin = origin
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[str, Any] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.baked: int | None = None
        self.nodes = 0
        self.parameters: dict[int, nn.Parameter] = {}

    def build(self) -> Flat:
        for spec in self.signature["input_specs"]:
            ((kind, content),) = spec.items()
            self.input(kind, content)
        for node in self.json["nodes"]:
            self.node(node)
        outputs = [
            self.argument(spec["user_output"]["arg"])
            for spec in self.signature["output_specs"]
            if "user_output" in spec
        ]
        self.graph.output(tuple(o for o in outputs if o is not None))
        return fx.GraphModule(self.root, self.graph), self.shapes, self.baked

    def input(self, kind: str, content: Mapping[str, Any]) -> None:
        if kind == "user_input":
            arg = content["arg"]
            if "as_none" in arg:
                return
            if "as_tensor" not in arg:
                raise UnsupportedModelError(
                    f"{self.origin}: an input of the exported model is no tensor; export it with tensor inputs only"
                )
            name = checked_name(str(arg["as_tensor"]["name"]), self.origin)
            sizes = self.json["tensor_values"][name]["sizes"]
            if not self.shapes and sizes and "as_int" in sizes[0]:
                self.baked = int(sizes[0]["as_int"])
            self.shapes.append(tuple(_size(s) for s in sizes))
            self.values[name] = self.graph.placeholder(name)
        elif kind in ("parameter", "buffer", "tensor_constant"):
            path = checked_path(str(content[f"{kind}_name"]), self.origin)
            if path not in self.tensors:
                raise ModelFileError(f"{self.origin}: the values of {kind} {path[:80]} are missing from the archive")
            tensor = self.tensors[path]
            if kind == "parameter" and tensor.is_floating_point():
                tensor = self.parameters.setdefault(id(tensor), nn.Parameter(tensor))  # one for tied weights
            place(self.root, path, tensor, buffer=kind != "parameter")
            self.values[str(content["arg"]["name"])] = self.graph.get_attr(path)
        elif kind == "constant_input":
            self.values[str(content["name"])] = next(iter(content["value"].values()), None)
        else:
            raise UnsupportedModelError(f"{self.origin}: the exported model takes a {kind[:40]}, expected tensors only")

    def node(self, node: Mapping[str, Any]) -> None:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise ModelFileError(f"{self.origin}: a graph of more than {_MAX_NODES} nodes; that is no model")
        if node["target"] in _CONTEXTS:
            self.context(node)
            return
        target = resolve(str(node["target"]), self.origin)
        args, kwargs = self.arguments(target, node["inputs"])
        outputs = node["outputs"]
        name = str(node.get("name") or (_output_name(outputs[0]) if outputs else "") or "call")
        made = self.graph.create_node("call_function", target, args, kwargs, name)
        if len(outputs) == 1 and "as_tensors" not in outputs[0]:
            self.name_output(outputs[0], made)
        else:  # several tensors: one list, or a tuple
            parts = _parts(outputs[0]) if len(outputs) == 1 else outputs
            for index, part in enumerate(parts):
                if (part_name := _output_name(part)) is not None:
                    item = self.graph.create_node("call_function", operator.getitem, (made, index), {}, part_name)
                    self.name_output(part, item)

    def context(self, node: Mapping[str, Any]) -> None:
        """A part under no_grad or autocast is a graph of its own; it is put in line (see contexts.py)."""
        arguments = [i["arg"] for i in node["inputs"]]
        at = next(i for i, arg in enumerate(arguments) if "as_graph" in arg)
        inner = arguments[at]["as_graph"]["graph"]
        operands = [self.argument(arg) for arg in arguments[at + 1 :]]
        outer = self.values
        self.values = dict(zip((_output_name(i) or "" for i in inner["inputs"]), operands, strict=True))
        for part in inner["nodes"]:
            self.node(part)
        results = [self.argument(o) for o in inner["outputs"]]
        self.values = outer
        names = [_output_name(p) for o in node["outputs"] for p in _parts(o)]
        self.values.update((name, r) for name, r in zip(names, results, strict=True) if name is not None)

    def name_output(self, output: Mapping[str, Any], node: fx.Node) -> None:
        name = _output_name(output)
        if name is None:
            return
        self.values[name] = node
        meta = self.json["tensor_values"].get(name) if "as_tensor" in output else None
        if meta is not None:  # lift wants to know the rank
            node.meta["val"] = torch.empty([1] * len(meta["sizes"]), device="meta")

    def arguments(self, target: Any, inputs: list[Mapping[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        schema = getattr(target, "_schema", None)
        if schema is None:
            return tuple(self.argument(i["arg"]) for i in inputs), {}
        values = {str(i["name"]): self.argument(i["arg"]) for i in inputs}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        gap = False
        for argument in schema.arguments:
            if argument.name not in values:
                gap = True
            elif argument.kwarg_only or gap:
                kwargs[argument.name] = values.pop(argument.name)
            else:
                args.append(values.pop(argument.name))
        if values:
            raise ModelFileError(f"{self.origin}: {target} has no argument {next(iter(values))[:40]!r}")
        return tuple(args), kwargs

    def argument(self, arg: Mapping[str, Any]) -> Any:
        ((kind, content),) = arg.items()
        if kind == "as_none":
            return None
        if kind in ("as_int", "as_bool", "as_string"):
            return _LITERALS[kind](content)
        if kind == "as_float":
            return float(content)
        if kind in ("as_ints", "as_bools", "as_strings"):
            return [_LITERALS[kind[:-1]](v) for v in content]
        if kind == "as_int_lists":
            return [[int(v) for v in values] for values in content]
        if kind in ("as_floats", "as_float_lists"):
            return [float(v) if not isinstance(v, list) else [float(x) for x in v] for v in content]
        if kind == "as_tensor":
            return self.values[str(content["name"])]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool", "as_optional_tensor"):
            return self.symbol(content)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors"):
            return [self.symbol(v) for v in content]
        if kind == "as_tensors":
            return [self.values[str(t["name"])] for t in content]
        if kind == "as_nested_tensors":
            return [[self.values[str(t["name"])] for t in ts] for ts in content]
        if kind == "as_scalar_type":
            return _SCALAR_TYPES[content]
        if kind == "as_memory_format":
            return _MEMORY_FORMATS[content]
        if kind == "as_layout" and content == 7:
            return torch.strided
        if kind == "as_device":
            return torch.device("cpu")
        raise UnsupportedModelError(f"{self.origin}: a graph argument of kind {kind[:40]!r} is not supported")

    def symbol(self, value: Mapping[str, Any]) -> Any:
        """as_name of a value, a number, or an optional tensor."""
        ((kind, content),) = value.items()
        if kind == "as_name":
            return self.values[str(content)]
        if kind == "as_tensor":
            return self.values[str(content["name"])]
        return None if kind == "as_none" else _LITERALS[kind](content)


def _parts(output: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A list of tensors is one output of several parts."""
    return [{"as_tensor": t} for t in output["as_tensors"]] if "as_tensors" in output else [output]


def _output_name(output: Mapping[str, Any]) -> str | None:
    ((kind, content),) = output.items()
    if kind == "as_tensor":
        return str(content["name"])
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        name = content.get("as_name")
        return None if name is None else str(name)
    return None
