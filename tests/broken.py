"""Model files that are broken or hostile, made deterministically from a seed, for tests/graph/test_load.py and
tools/fuzz_load.

Every payload is the same harmless command, ``touch SENTINEL``: if the sentinel exists afterwards, a file was obeyed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

Members = dict[str, bytes]


class SmallNet(nn.Module):
    """Convolution, batch norm, interpolation, a branch on ``training`` and sizes taken from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.Conv2d(8, 8, 1)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8 * 4, 5)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        z = F.interpolate(self.up(F.avg_pool2d(y, 2)), size=y.shape[-2:], mode="nearest")
        y = y + z
        if self.training:
            y = y * 2
        return self.fc(self.drop(F.adaptive_avg_pool2d(y, 2).view(x.size(0), -1)))


class Payload:
    """Unpickling this runs ``touch sentinel``."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = SmallNet()
    net.bn.running_mean.uniform_(-0.5, 0.5)
    net.bn.running_var.uniform_(0.5, 1.5)
    return net.eval()


def sound_files() -> dict[str, bytes]:
    """One valid file of each kind, by name."""
    net, x = small_net(), torch.randn(2, 3, 16, 16)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(net, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    checkpoint = {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}
    return {
        "exported": _written(lambda f: torch.export.save(program, f)),
        "traced": _written(lambda f: torch.jit.save(torch.jit.trace(net, x), f)),
        "scripted": _written(lambda f: torch.jit.save(torch.jit.script(net), f)),
        "weights": _written(lambda f: torch.save(net.state_dict(), f)),
        "legacy": _written(lambda f: torch.save(net.state_dict(), f, _use_new_zipfile_serialization=False)),
        "checkpoint": _written(lambda f: torch.save(checkpoint, f)),
        "module": _written(lambda f: torch.save(net, f)),
    }


def cases(seed: int, sentinel: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """``count`` broken files as (description, content): the aimed ones (two thirds at most), then random damage."""
    rng = random.Random(seed)
    sound = sound_files()
    aimed = list(_aimed(sound, sentinel))
    share = count * 2 // 3
    if share < len(aimed):
        aimed = [aimed[i] for i in sorted(rng.sample(range(len(aimed)), share))]
    yield from aimed
    kinds = (_truncated, _flipped, _flipped_inside, _member_damage)
    for index in range(count - len(aimed)):
        name = rng.choice(sorted(sound))
        what, content = kinds[index % len(kinds)](sound[name], rng)
        yield f"{name}: {what}", content


def _written(save: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


def members(content: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist()}


def zipped(parts: Members, method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _truncated(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    at = rng.randrange(1, len(content))
    return f"cut off at {at}", content[:at]


def _flipped(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    data = bytearray(content)
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return "bits flipped", bytes(data)


def _flipped_inside(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage that the checksum does not show: the archive is written anew around it."""
    if not content.startswith(b"PK"):
        return _flipped(content, rng)
    parts = members(content)
    names = [n for n in parts if parts[n] and not n.endswith((".debug_pkl", "serialization_id"))]
    texts = [n for n in names if n.endswith((".pkl", ".json", ".py"))]
    name = rng.choice(texts if rng.random() < 0.8 else names)
    data = bytearray(parts[name])
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(len(data))
        if rng.random() < 0.3:
            del data[at : at + rng.randrange(1, 20)]
            data = data or bytearray(b"0")
        else:
            data[at] = rng.choice(b"0123456789-.,:{}[]()\"' aesTFN\x00\xff")
    return f"{name} changed, checksum right", zipped({**parts, name: bytes(data)})


def _member_damage(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    if not content.startswith(b"PK"):
        return _truncated(content, rng)
    parts = members(content)
    a, b = rng.sample(sorted(parts), 2)
    kind = rng.choice(("lost", "emptied", "swapped", "renamed", "doubled"))
    if kind == "lost":
        del parts[a]
    elif kind == "emptied":
        parts[a] = b""
    elif kind == "swapped":
        parts[a], parts[b] = parts[b], parts[a]
    elif kind == "renamed":
        parts[f"other/{a}"] = parts.pop(a)
    else:
        stream = io.BytesIO(zipped(parts))
        with zipfile.ZipFile(stream, "a") as archive:
            archive.writestr(zipfile.ZipInfo(a), parts[b])
        return f"member {a} twice", stream.getvalue()
    return f"member {a} {kind}", zipped(parts)


def _aimed(sound: dict[str, bytes], sentinel: Path) -> Iterator[tuple[str, bytes]]:
    yield from _no_models()
    yield from _pickle_payloads(sound, sentinel)
    yield from _graph_payloads(sound["exported"], f"touch {sentinel}")
    yield from _script_payloads(sound, f"touch {sentinel}")
    yield from _bombs(sound)


def _no_models() -> Iterator[tuple[str, bytes]]:
    noise = random.Random(7).randbytes(4096)
    yield "empty", b""
    yield "one byte", b"P"
    yield "text", b"hello, I am not a model\n" * 40
    yield "html", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "json", b'{"model": [1, 2, 3]}'
    yield "png", b"\x89PNG\r\n\x1a\n" + noise
    yield "jpeg", b"\xff\xd8\xff\xe0" + noise
    yield "gzip", b"\x1f\x8b\x08\x00" + noise
    yield "noise", noise
    yield "tflite", b"\x1c\x00\x00\x00TFL3" + noise
    yield "safetensors, header of 2^60 bytes", struct.pack("<Q", 1 << 60) + b'{"a":{}}'
    yield "onnx, cut off", b"\x08\x08\x12\x07pytorch\x3a\xff\xff\xff\x7f" + noise
    yield "onnx, endless lengths", b"\x08\x08" + b"\x12\x00" * 2000
    yield "zip of a text", zipped({"readme.txt": b"hello"})
    yield "empty zip", zipped({})
    yield "zip header only", b"PK\x03\x04" + noise
    yield "zip end only", b"PK\x05\x06" + bytes(18)


def _pickle_payloads(sound: dict[str, bytes], sentinel: Path) -> Iterator[tuple[str, bytes]]:
    evil = Payload(sentinel)
    bare = pickle.dumps(evil, protocol=2)
    as_saved = _written(lambda f: torch.save({"conv.weight": evil}, f))
    yield "bare pickle", bare
    yield "bare pickle, protocol 0", pickle.dumps(evil, protocol=0)
    yield "bare pickle, protocol 5", pickle.dumps(evil, protocol=5)
    yield "state_dict with a payload as value", as_saved
    yield "legacy file with a payload", _written(lambda f: torch.save(evil, f, _use_new_zipfile_serialization=False))
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    yield "legacy, payload as protocol", magic + bare
    yield "legacy, payload as system info", magic + pickle.dumps(1001, protocol=2) + bare
    for kind in ("exported", "traced", "scripted", "weights", "checkpoint", "module"):
        parts = members(sound[kind])
        for name in parts:
            if name.endswith(
                (".pkl", ".pt", "byteorder", "version", "serialization_id", ".json", "data/0", "weight_0")
            ):
                yield f"{kind}: payload as {name}", zipped({**parts, name: bare})
            if name.endswith(".pkl") and parts[name].endswith(b"."):
                both = bare[:-1] + b"0" + parts[name][2:]  # run the payload, drop its result, go on as before
                yield f"{kind}: payload in front of {name}", zipped({**parts, name: both})
    parts = members(sound["exported"])
    root = next(iter(parts)).split("/")[0]
    config = f"{root}/data/weights/model_weights_config.json"
    doc = json.loads(parts[config])
    first = next(iter(doc["config"].values()))
    first["use_pickle"] = True
    changed = {**parts, config: json.dumps(doc).encode(), f"{root}/data/weights/{first['path_name']}": as_saved}
    yield "exported: a weight as a pickle", zipped(changed)
    for prefix in ("opaque_obj_0", "custom_obj_0", "tensor_0"):
        entry = {"path_name": prefix, "is_param": False, "use_pickle": True, "tensor_meta": None}
        constants = json.dumps({"config": {"c": entry}}).encode()
        names = {
            f"{root}/data/constants/model_constants_config.json": constants,
            f"{root}/data/constants/{prefix}": bare,
        }
        yield f"exported: a constant as {prefix}", zipped({**parts, **names})
    for name in ("data/weights/model.pt", "data/constants/model.pt"):
        yield f"exported: old style {name}", zipped({**parts, f"{root}/{name}": as_saved})
        yield f"exported: old style {name}, bare", zipped({**parts, f"{root}/{name}": bare})
    program = parts[f"{root}/models/model.json"]
    old = {"serialized_exported_program.json": program, "serialized_constants.pt": bare, "version": b"8.20"}
    yield "exported: layout of 2.1", zipped({**old, "serialized_state_dict.pt": as_saved})
    yield "exported: layout of 2.1, bare", zipped({**old, "serialized_state_dict.pt": bare})
    library = {f"{root}/data/aotinductor/model/model.so": b"\x7fELF" + bytes(100)}
    yield "exported: a shared library beside it", zipped({**parts, **library})
    only = {k: v for k, v in parts.items() if "/models/" not in k}
    yield "exported: a shared library only", zipped({**only, **library})


_EVIL_TARGETS = """
    torch.hub.load torch.load torch.os.system torch.serialization.os.system torch.utils.os.system
    torch._dynamo.config.patch _operator.methodcaller _operator.attrgetter _operator.call math.__loader__
    os.system builtins.exec #edgeprune:os.system torch.ops.load_library torch.ops.aten.from_file.default
    torch.ops.aten.save torch.ops.aten.save.default torch.ops.higher_order.cond torch.ops.aten.relu.__class__
    torch.ops.aten.__class__.__init__ torch.ops.custom.evil.default torch.ops.aten._op.default
"""


def _graph_payloads(content: bytes, command: str) -> Iterator[tuple[str, bytes]]:
    parts = members(content)
    path = next(n for n in parts if n.endswith("models/model.json"))
    weights = next(n for n in parts if n.endswith("model_weights_config.json"))
    code = f"__import__('os').system('{command}')"

    def changed(change: Callable[[dict], object], member: str = path) -> bytes:
        doc = json.loads(parts[member])
        change(doc)
        return zipped({**parts, member: json.dumps(doc).encode()})

    def graph(doc: dict) -> dict:
        return doc["graph_module"]["graph"]

    def target(name: str, *args: str) -> Callable[[dict], object]:
        inputs = [{"name": "", "arg": {"as_string": a}, "kind": 1} for a in args]
        return lambda doc: graph(doc)["nodes"][0].update(target=name, inputs=inputs)

    for name in _EVIL_TARGETS.split():
        yield f"exported: target {name}", changed(target(name, command))

    def sizes(value: object) -> Callable[[dict], object]:
        return lambda doc: graph(doc)["tensor_values"]["x"].update(sizes=[value] * 4)

    hint = {"as_expr": {"expr_str": code, "hint": {"as_int": 16}}}
    yield "exported: payload as size expression", changed(sizes(hint))
    yield "exported: payload as a symbol", changed(lambda d: graph(d)["sym_int_values"].update(s0=hint))
    yield "exported: size of 10^18", changed(sizes({"as_int": 10**18}))
    yield "exported: negative size", changed(sizes({"as_int": -3}))
    yield "exported: size as text", changed(sizes({"as_int": code}))
    yield "exported: payload as guard", changed(lambda d: d.update(guards_code=[code]))
    yield "exported: payload as range", changed(lambda d: d.update(range_constraints={code: {"min_val": 1}}))
    yield (
        "exported: payload as stack",
        changed(
            lambda d: graph(d)["nodes"][0]["metadata"].update(torch_fn=code, nn_module_stack=f"a,,{code};b,c,os.system")
        ),
    )
    yield (
        "exported: payload as tree",
        changed(
            lambda d: d["graph_module"]["module_call_graph"][0].update(signature={"in_spec": code, "out_spec": code})
        ),
    )

    def renamed(old: str, new: str) -> bytes:
        text = parts[path].decode().replace(f'"{old}"', json.dumps(new))
        return zipped({**parts, path: text.encode()})

    yield "exported: payload as input name", renamed("x", f"x={code}")
    yield "exported: payload as input name, lines", renamed("x", f"x):\n  {code}\n#")
    yield "exported: payload as node name", renamed("relu", f"relu = {code}\n")
    quote = f'conv"), {code}, getattr(self, "w'
    text = parts[path].decode().replace('"conv.weight"', json.dumps(quote))
    config = parts[weights].decode().replace('"conv.weight"', json.dumps(quote))
    yield "exported: payload as weight name", zipped({**parts, path: text.encode(), weights: config.encode()})
    yield (
        "exported: payload as text argument",
        changed(
            lambda d: next(n for n in graph(d)["nodes"] if "conv2d" in n["target"])["inputs"].append(
                {"name": "padding", "arg": {"as_string": f"'+{code}+'"}, "kind": 2}
            )
        ),
    )
    yield "exported: nested 10^5 deep", zipped({**parts, path: b"[" * 100_000 + b"]" * 100_000})
    yield "exported: number of 10^6 digits", zipped({**parts, path: b'{"graph_module": ' + b"9" * 1_000_000 + b"}"})
    yield "exported: JSON of another kind", zipped({**parts, path: b'[null, 3, "x"]'})
    yield "exported: graph without nodes", changed(lambda d: graph(d).update(nodes=[], inputs=[], outputs=[]))

    def tensor(**meta: object) -> Callable[[dict], object]:
        return lambda d: next(iter(d["config"].values()))["tensor_meta"].update(meta)

    huge = [{"as_int": 1 << 40}, {"as_int": 1 << 20}]
    yield "exported: weight of 2^60 values", changed(tensor(sizes=huge, strides=[{"as_int": 1}] * 2), weights)
    yield "exported: weight of 2^60 values, stride 0", changed(tensor(sizes=huge, strides=[{"as_int": 0}] * 2), weights)
    yield "exported: weight at a far offset", changed(tensor(storage_offset={"as_int": 1 << 50}), weights)
    yield "exported: weight at a negative offset", changed(tensor(storage_offset={"as_int": -5}), weights)
    yield "exported: weight of an unknown type", changed(tensor(dtype=99), weights)
    yield (
        "exported: weight outside the archive",
        changed(lambda d: next(iter(d["config"].values())).update(path_name="../../../../etc/passwd"), weights),
    )
    full = {"name": "", "arg": {"as_ints": [1 << 40]}, "kind": 1}
    yield (
        "exported: zeros of 2^40",
        changed(
            lambda d: graph(d)["nodes"][0].update(
                target="torch.ops.aten.zeros.default", inputs=[{**full, "name": "size"}]
            )
        ),
    )


def _script_payloads(sound: dict[str, bytes], command: str) -> Iterator[tuple[str, bytes]]:
    parts = members(sound["scripted"])
    main = next(n for n in parts if n.endswith(".py") and b"class SmallNet" in parts[n])
    source = parts[main].decode()
    head = source.index("  def forward(")
    body = source.index("\n", source.index("-> Tensor:", head)) + 1
    code = f'__import__("os").system("{command}")'
    path = command.split()[-1]

    def first(line: str) -> bytes:
        return zipped({**parts, main: (source[:body] + f"    {line}\n" + source[body:]).encode()})

    for line in (
        f'torch.save(x, "{path}")',
        f'ops.aten.save(x, "{path}")',
        f'torch.from_file("{path}", True, 10)',
        f"ops.aten.from_file('{path}', True, 10)",
        code,
        f"import os; os.system('{command}')",
        f"_0 = [{code} for _ in x]",
        f"_0 = (lambda: {code})()",
        f"_0 = x.__class__.__mro__; {code}",
        f"_0 = f'{{{code}}}'",
        f"_0 = torch.hub.load('{path}', 'x')",
        f"_0 = torch.os.system('{command}')",
        f"_0 = ops.custom.evil(x, '{path}')",
        f"_0 = __torch__.os.system('{command}')",
        "_0 = getattr(x, '__class__')",
        f"exec('{code}')",
        f"with open('{path}', 'w') as f: pass",
        f"assert {code}",
        "del x",
        f"_0 = ^Evil('{path}')(x)",
        "while True: pass",
        "for i in range(1000000000): pass",
        "_0 = (self).forward(x, )",
        "_0 = torch.mul([0], 1000000000000)",
        "_0 = torch.pow(10, 1000000000)",
        "_0 = torch.mul(100000000000, 'a')",
        "_0 = torch.remainder('%99999999999d', 1)",
        "_0 = [x]; " + "_0 = [_0, _0, _0, _0]; " * 40 + "return _0",
        "_0 = [1]; " + "_0 = [_0, _0, _0, _0]; " * 40 + "_1 = torch.cat(_0)",
        "_0 = [1]; _1 = [1]; " + "_0 = [_0, _0]; _1 = [_1, _1]; " * 40 + "_2 = torch.eq(_0, _1)",
        "_0 = [1]; " + "_0 = torch.add(_0, _0); " * 60,
        "_0 = torch.size(x, 0); " + "_0 = torch.mul(torch.add(_0, 1), _0); " * 40,
        "_0 = x; " + "_0 = torch.add(_0, 1); " * 7_000,
        "_0 = torch.mul('a', 100000000000)",
        "_0 = torch.zeros([1000000, 1000000, 1000])",
        "_0 = torch.format('{0.__class__}{:>99999999999}', 1)",
        "_0 = torch.add(x, torch.zeros([1099511627776]))",
        "ops.prim.RaiseException('a\\nb')",
        "_0 = " + "(" * 500 + ")" * 500,
        "_0 = " + "-" * 20_000 + "1",
        "x = 3",
        "return None",
        "return x0",
        "_0 = CONSTANTS.c99999",
    ):
        yield f"scripted: {line[:60]}", first(line)
    state = f"  def __setstate__(self, state: Tensor) -> NoneType:\n    ops.aten.save(state, '{path}')\n"
    yield "scripted: __setstate__", zipped({**parts, main: (source[:head] + state + source[head:]).encode()})
    default = source.replace("x: Tensor) ->", f"x: Tensor={code}) ->", 1)
    yield "scripted: payload as default", zipped({**parts, main: default.encode()})
    yield "scripted: payload as decorator", zipped({**parts, main: f"@{code}\n{source}".encode()})
    yield "scripted: payload at top level", zipped({**parts, main: f"{code}\n{source}".encode()})
    final = source[:body] + "    _e = self.evil\n" + source[body:]
    final = final[:head] + f"  evil : Final[int] = {code}\n" + final[head:]
    yield "scripted: payload as constant", zipped({**parts, main: final.encode()})
    yield (
        "scripted: payload as parameters",
        zipped({**parts, main: source.replace("__parameters__ = []", f"__parameters__ = [{code}]").encode()}),
    )
    yield "scripted: zero bytes in the code", zipped({**parts, main: source.encode() + b"\0\0"})
    yield "scripted: no code", zipped({**parts, main: b""})
    data = next(n for n in parts if n.endswith("/data.pkl"))
    name = b'q"+1)'
    evil = parts[data].replace(b"X\x04\x00\x00\x00conv", b"X" + struct.pack("<I", len(name)) + name, 1)
    yield "scripted: payload as module name", zipped({**parts, data: evil})
    yield (
        "scripted: class of another world",
        zipped({**parts, data: parts[data].replace(b"__torch__", b"os_______", 1)}),
    )


def _bombs(sound: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    parts = members(sound["weights"])
    data = next(n for n in parts if n.endswith("/data.pkl"))
    storage = next(n for n in parts if n.endswith("/data/0"))
    bomb = zipped({**parts, storage: bytes(200 << 20)}, zipfile.ZIP_DEFLATED)
    yield "zip bomb, 200 MiB of zeros", bomb
    claimed = bytearray(sound["weights"])
    at = claimed.rindex(storage.encode()) - 46  # its entry in the table of members
    struct.pack_into("<II", claimed, at + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    yield "member claims 4 GiB", bytes(claimed)
    end = bytearray(zipped(parts))
    struct.pack_into("<HHI", end, len(end) - 14, 0xFFFE, 0xFFFE, 0xFFFFFF00)
    yield "table of members claims 4 GiB", bytes(end)
    yield "bzip2 bomb", zipped({**parts, storage: bytes(50 << 20)}, zipfile.ZIP_BZIP2)
    many = {f"a/{i}": b"" for i in range(30_000)}
    yield "30 000 members", zipped(many)
    numel = parts[data].replace(b"K\xd8", b"J\xff\xff\xff\x7f", 1)  # 216 values of the first weight
    yield "storage claims 2^31 values", zipped({**parts, data: numel})
    yield "pickle, memo index 2^31", zipped({**parts, data: b"\x80\x02}r\xff\xff\xff\x7f."})
    yield "pickle, text of 4 GiB", zipped({**parts, data: b"\x80\x02X\xff\xff\xff\xffabc."})
    yield "pickle, bytes of 2^62", zipped({**parts, data: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc."})
    yield "pickle, array of 2^62", zipped({**parts, data: b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"abc."})
    yield (
        "pickle nested 10^6 deep",
        zipped({**parts, data: b"\x80\x02" + b"]" * 1 + b"(" * 500_000 + b"t" * 500_000 + b"."}),
    )
    yield "pickle without end", zipped({**parts, data: b"\x80\x02}"})
    yield "pickle, empty stack", zipped({**parts, data: b"\x80\x02000t."})
    yield "pickle, itself as item", zipped({**parts, data: b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."})
    negative = parts[data].replace(b"K\x08", b"J\xff\xff\xff\xff", 1)
    yield "tensor of negative size", zipped({**parts, data: negative})
    legacy = bytearray(sound["legacy"])
    where = legacy.rindex(b"e.") + 2  # behind the list of storage keys: the length of the first storage
    legacy[where : where + 8] = struct.pack("<q", 1 << 60)
    yield "legacy storage of 2^60 values", bytes(legacy)
    legacy[where : where + 8] = struct.pack("<q", -1)
    yield "legacy storage of -1 values", bytes(legacy)
