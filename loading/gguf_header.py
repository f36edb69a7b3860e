"""Strict reader of one GGUF file's header: its metadata, and which tensor lies where. No weight byte is read.

The format: "GGUF", a version, the numbers of tensors and of metadata entries, the entries, a description of each
tensor, then the data, each tensor at a multiple of the alignment. What a header claims is believed only as far as the
file bears it out: nothing is allocated for a length before the bytes are there, tensors follow each other without
holes or overlaps and end where the file ends. Texts of vocabularies are stepped over.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError
from .header import FileStamp
from .regular import RegularFile, open_regular

MAX_HEADER = 64 << 20
MAX_TEXT = 16 << 20
MAX_KEY = 1 << 16
MAX_NAME = 512
_MOST_ENTRIES = 1 << 20
_MOST_DIMENSIONS = 4
_MOST_KEPT = 4096  # elements of an array of numbers that are kept; longer ones belong to vocabularies
_LIMIT = 1 << 63
_WINDOW = 1 << 20
_ALIGNMENT = 32
_SCALARS: dict[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9


class Kind(NamedTuple):
    """One way of ggml to hold numbers: ``block`` of them take ``nbytes``."""

    name: str
    block: int
    nbytes: int


KINDS: dict[int, Kind] = {
    number: Kind(*facts)
    for number, facts in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
        25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    }.items()
}  # fmt: skip


class Array(NamedTuple):
    """An array of the metadata: its length, and its numbers if they are few."""

    length: int
    values: tuple[Any, ...] | None


class GGUFTensor(NamedTuple):
    """One tensor: its shape as torch has it (rows before columns), and ``nbytes`` bytes at ``begin`` of the file."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class GGUFHeader(NamedTuple):
    """Metadata (numbers, booleans, texts, `Array`) and tensors, in the order of their bytes, of one file."""

    file: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    stamp: FileStamp


def read_gguf_header(file: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of one GGUF file (version 2 or 3, little-endian).

    Raises NotFoundError, PathError (not a regular file) or FormatError naming the file and what is wrong.
    """
    path = Path(file)
    with open_regular(path) as opened:
        cursor = _Cursor(opened)
        try:
            return _read(cursor, path, opened.stamp)
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise FormatError(f"{path}: malformed GGUF header at byte {cursor.place} ({error})") from error


class _Cursor:
    """Goes through the header with a window on the file: ``data`` from ``base`` on, and a position in it."""

    def __init__(self, file: RegularFile) -> None:
        self.file, self.base, self.position = file, 0, 0
        self.data = file.read(0, min(file.size, _WINDOW))

    @property
    def place(self) -> int:
        """The position in the file."""
        return self.base + self.position

    def require(self, count: int) -> None:
        """See to it that ``count`` more bytes are in the window; FormatError if the file has not as many."""
        end = self.place + count
        if self.position + count <= len(self.data) and end <= MAX_HEADER:
            return
        if end > self.file.size:
            raise FormatError(
                f"{self.file.path} is truncated or lies about its lengths: its header goes on to byte {end} at least, "
                f"the file has {self.file.size}; fetch it again"
            )
        if end > MAX_HEADER:
            raise FormatError(f"{self.file.path}: a header of over {MAX_HEADER} bytes; that is no GGUF file of weights")
        self.base, self.position = self.place, 0
        self.data = self.file.read(self.base, min(max(count, _WINDOW), self.file.size - self.base))

    def left(self) -> int:
        return self.file.size - self.place

    def take(self, count: int) -> bytes:
        self.require(count)
        part = self.data[self.position : self.position + count]
        self.position += count
        return part

    def skip(self, count: int) -> None:
        """Step over bytes, of which there are as many."""
        self.position += count
        if self.position > len(self.data):
            self.base, self.position, self.data = self.place, 0, b""
            self.require(0)

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def count(self, what: str, at_least: int) -> int:
        """A number of things of which each takes ``at_least`` so many bytes."""
        count = self.number("<Q")
        if count * at_least > self.left():
            raise FormatError(
                f"{self.file.path}: {count} {what} do not fit the {self.left()} bytes left; truncated or not GGUF"
            )
        return count

    def text(self, what: str, longest: int) -> str:
        length = self.number("<Q")
        if length > longest:
            raise FormatError(f"{self.file.path}: {what} of {length} bytes; {longest} are allowed")
        return self.take(length).decode("utf-8")

    def skip_texts(self, count: int) -> None:
        data, position = self.data, self.position
        for _ in range(count):
            if position + 8 > len(data):
                self.position = position
                self.require(8)
                data, position = self.data, self.position
            end = position + 8 + int.from_bytes(data[position : position + 8], "little")
            if end > len(data):
                self.position = position
                self.require(end - position)
                data, end = self.data, end - position + self.position
            position = end
        self.position = position


def _read(cursor: _Cursor, path: Path, stamp: FileStamp) -> GGUFHeader:
    magic = cursor.data[:4]
    if magic != b"GGUF":
        raise FormatError(f"{path} is not a GGUF file (it begins with {magic!r}); fetch the real file")
    cursor.position = 4
    version = cursor.number("<I")
    if version not in (2, 3):
        other = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        kind = "is big-endian" if other else f"is GGUF of version {version}"
        raise FormatError(f"{path} {kind}; little-endian files of version 2 and 3 are read: convert it again")
    tensors = cursor.count("tensors", 8 + 4 + 8 + 4 + 8)
    entries = cursor.count("metadata entries", 8 + 4 + 1)
    if max(tensors, entries) > _MOST_ENTRIES:
        raise FormatError(f"{path}: {tensors} tensors and {entries} metadata entries are too many")
    fields: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text("a metadata key", MAX_KEY)
        if not key or not key.isprintable() or key in fields:
            fault = "is there twice" if key in fields else "is no name"
            raise FormatError(f"{path}: metadata key {key[:80]!r} {fault}")
        fields[key] = _value(cursor, cursor.number("<I"), key)
    described = [_describe(cursor) for _ in range(tensors)]
    return GGUFHeader(path, fields, _place(described, _alignment(fields, path), cursor, path), stamp)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _BOOL:
        return _boolean(cursor.take(1)[0], cursor, key)
    if kind == _STRING:
        return cursor.text(f"the text of {key!r}", MAX_TEXT)
    if kind != _ARRAY:
        raise FormatError(f"{cursor.file.path}: metadata {key!r} has the unknown type {kind}")
    inner = cursor.number("<I")
    if inner == _STRING:
        length = cursor.count(f"texts of {key!r}", 8)
        cursor.skip_texts(length)
        return Array(length, None)
    code = "<B" if inner == _BOOL else _SCALARS.get(inner)
    if code is None:
        what = "arrays in an array" if inner == _ARRAY else f"the unknown type {inner}"
        raise FormatError(f"{cursor.file.path}: metadata {key!r} holds {what}, which is not read")
    size = struct.calcsize(code)
    length = cursor.count(f"elements of {key!r}", size)
    if length > _MOST_KEPT:
        cursor.skip(length * size)
        return Array(length, None)
    raw = cursor.take(length * size)
    values = struct.unpack(f"<{length}{code[1]}", raw)
    if inner == _BOOL:
        values = tuple(_boolean(value, cursor, key) for value in values)
    return Array(length, values)


def _boolean(value: int, cursor: _Cursor, key: str) -> bool:
    if value > 1:
        raise FormatError(f"{cursor.file.path}: metadata {key!r} is a boolean of value {value}")
    return bool(value)


def _alignment(fields: Mapping[str, Any], path: Path) -> int:
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise FormatError(f"{path}: general.alignment must be a power of two from 8, not {str(alignment)[:40]!r}")
    return alignment


def _describe(cursor: _Cursor) -> tuple[str, Kind, tuple[int, ...], int, int]:
    """Name, kind, shape, offset in the data and size of one tensor."""
    path = cursor.file.path
    name = cursor.text("a tensor name", MAX_NAME)
    if not name or not name.isprintable():
        raise FormatError(f"{path}: tensor name {name[:80]!r} is empty or holds control characters")
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise FormatError(f"{path}: tensor {name!r} has {dimensions} dimensions; 1 to {_MOST_DIMENSIONS} are allowed")
    sizes = [cursor.number("<Q") for _ in range(dimensions)]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    kind = KINDS.get(number)
    if kind is None:
        known = ", ".join(kind.name for kind in KINDS.values())
        raise FormatError(f"{path}: tensor {name!r} is of type {number}, which is not read; known are {known}")
    count = math.prod(sizes)
    if count == 0 or max(sizes) >= _LIMIT or count >= _LIMIT // 8:
        raise FormatError(f"{path}: tensor {name!r} has the impossible shape {tuple(reversed(sizes))}")
    if sizes[0] % kind.block:
        raise FormatError(
            f"{path}: tensor {name!r} has rows of {sizes[0]} elements, which blocks of {kind.block} ({kind.name}) do "
            "not fill"
        )
    return name, kind, tuple(reversed(sizes)), offset, count // kind.block * kind.nbytes


def _place(
    described: list[tuple[str, Kind, tuple[int, ...], int, int]], alignment: int, cursor: _Cursor, path: Path
) -> dict[str, GGUFTensor]:
    """The tensors in the order of their bytes, which must follow each other and fill the file."""
    start = _padded(cursor.place, alignment)
    tensors: dict[str, GGUFTensor] = {}
    position = 0
    for name, kind, shape, offset, size in sorted(described, key=lambda one: one[3]):
        if name in tensors:
            raise FormatError(f"{path}: tensor {name!r} is there twice")
        if offset != _padded(position, alignment):
            fault = "overlaps the one before it" if offset < position else "leaves a hole before it or is not aligned"
            raise FormatError(f"{path}: tensor {name!r} at {offset} {fault}, which ends at {position}")
        position = offset + size
        if start + position > cursor.file.size:
            raise FormatError(
                f"{path} is truncated: tensor {name!r} ends at byte {start + position}, the file has "
                f"{cursor.file.size}; fetch it again"
            )
        tensors[name] = GGUFTensor(name, kind, shape, start + offset, size)
    if tensors and cursor.file.size > _padded(start + position, alignment):
        raise FormatError(f"{path}: {cursor.file.size - start - position} bytes after the last tensor; damaged?")
    return tensors


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
