"""What a file that torch did not write seems to be, for a message that helps."""

from __future__ import annotations

from pathlib import Path

_SIGNATURES = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a RIFF file (WebP, WAV)"),
    (b"\x89HDF", "an HDF5 file (Keras); convert the network to torch first"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"\x7fELF", "a program"),
    (b"%PDF", "a PDF document"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"<", "an HTML or XML text, perhaps a failed download"),
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with git lfs pull"),
)
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}  # number -> wire type


def describe(head: bytes) -> str:
    """``head``: the first bytes of the file (a few hundred)."""
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    if head[4:6] == b"ET":
        return "an ExecuTorch program, which holds no torch graph"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head[8:9] == b"{" and len(head) > 8 and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file; load it in torch and save the state_dict with torch.save"
    if head.lstrip()[:1] in (b"{", b"["):
        return "a JSON text"
    text = sum(b in b"\t\n\r" or 32 <= b < 127 for b in head)
    return "a text file" if text == len(head) else "no model file of a known kind (damaged, or not a model)"


def looks_like_onnx(path: Path, size: int) -> bool:
    """Whether the file reads as a protobuf ModelProto: known top-level fields of the right types, up to the graph."""
    with path.open("rb") as file:
        position = 0
        seen: set[int] = set()
        while position < size and len(seen) < 64:
            file.seek(position)
            buffer = file.read(24)
            tag, used = _varint(buffer, 0)
            number, wire = tag >> 3, tag & 7
            if _ONNX_FIELDS.get(number) != wire:
                return False
            value, used = _varint(buffer, used)
            if used < 0:
                return False
            seen.add(number)
            position += used + (value if wire == 2 else 0)
            if number == 7:
                return 1 in seen and position <= size
    return False


def _varint(buffer: bytes, start: int) -> tuple[int, int]:
    """Value and the position behind it; (-1, -1) when there is none."""
    value = 0
    for index in range(start, min(start + 10, len(buffer))):
        value |= (buffer[index] & 127) << (7 * (index - start))
        if buffer[index] < 128:
            return value, index + 1
    return -1, -1
