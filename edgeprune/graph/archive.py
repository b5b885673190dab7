"""Reading a zip archive that nobody vouches for: bounded sizes, checked sums, nothing unpacked to disk.

torch writes all its formats of today as plain zip files (members stored or deflated, all below one folder). What a
broken or hostile archive can do is claim more than it holds, expand to more than fits in memory, or list millions of
members; all three are looked at before anything is read.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from edgeprune.errors import ModelFileError

MAX_FILE_BYTES = 4 << 30
MAX_TEXT_BYTES = 32 << 20  # the largest JSON graph, pickle or source member that is worth parsing
_MAX_DIRECTORY_BYTES = 4 << 20
_EXPANSION = 4  # weights hardly compress; what grows more than this is no model
_EXPANSION_FREE_BYTES = 64 << 20
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)
_END, _END64 = b"PK\x05\x06", b"PK\x06\x06"


class Archive:
    """The members of one zip file, by name; torch's common folder in front of all names is left out."""

    def __init__(self, stream: BinaryIO, label: str):
        """``label`` names the file in messages. The stream is closed with the archive."""
        self.label = label
        self._stream = stream
        size = stream.seek(0, io.SEEK_END)
        _check_directory(stream, size, label)
        try:
            self._zip = zipfile.ZipFile(stream)
            infos = [i for i in self._zip.infolist() if not i.is_dir()]
        except _DAMAGE as error:
            raise ModelFileError(
                f"{label}: the zip archive is damaged ({error}); copy or save the file again"
            ) from error
        self._infos = _by_name(infos, label)
        total = sum(i.file_size for i in infos)
        if total > _EXPANSION_FREE_BYTES + _EXPANSION * size:
            raise ModelFileError(
                f"{label}: the archive claims to expand to {total / 2**20:.0f} MiB, far more than its own size; "
                "that is no model, nothing was unpacked"
            )

    @staticmethod
    def open(path: Path) -> Archive:
        return Archive(path.open("rb"), str(path))

    @staticmethod
    def nested(data: bytes, label: str) -> Archive:
        """An archive that is itself a member of another one."""
        return Archive(io.BytesIO(data), label)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._zip.close()
        self._stream.close()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str, limit_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """One member, its checksum verified. Raises ModelFileError if it is missing, too large or damaged."""
        info = self._infos.get(name)
        if info is None:
            raise ModelFileError(f"{self.label}: member {name} is missing from the archive; save the model again")
        if info.file_size > limit_bytes:
            raise ModelFileError(
                f"{self.label}: member {name} is {info.file_size} bytes, at most {limit_bytes} were expected"
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ModelFileError(f"{self.label}: member {name} is compressed in a way torch never writes")
        try:
            data = self._zip.read(info)
        except _DAMAGE as error:
            raise ModelFileError(
                f"{self.label}: member {name} is damaged ({error}); copy or save the file again"
            ) from error
        if len(data) != info.file_size:
            raise ModelFileError(f"{self.label}: member {name} ends early; copy or save the file again")
        return data


def _check_directory(stream: BinaryIO, size: int, label: str) -> None:
    """zipfile makes an object per member, so the table of members must be of a sane size before it is parsed."""
    stream.seek(max(0, size - (1 << 16) - 512))
    tail = stream.read()
    end, end64 = tail.rfind(_END), tail.rfind(_END64)
    claimed = 0
    if 0 <= end <= len(tail) - 16:
        claimed = struct.unpack_from("<I", tail, end + 12)[0]
        if claimed == 0xFFFFFFFF:
            claimed = 0
    if 0 <= end64 <= len(tail) - 48:
        claimed = max(claimed, struct.unpack_from("<Q", tail, end64 + 40)[0])
    if claimed > min(size, _MAX_DIRECTORY_BYTES):
        raise ModelFileError(f"{label}: the archive claims a table of members of {claimed} bytes; that is no model")


def _by_name(infos: list[zipfile.ZipInfo], label: str) -> dict[str, zipfile.ZipInfo]:
    names = [i.filename for i in infos]
    if len(set(names)) != len(names):
        raise ModelFileError(f"{label}: the archive holds two members of one name; save the model again")
    roots = {n.partition("/")[0] for n in names}
    strip = len(roots) == 1 and all("/" in n for n in names)
    return {(i.filename.partition("/")[2] if strip else i.filename): i for i in infos}
