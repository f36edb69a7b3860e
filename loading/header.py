"""Strict reader of one safetensors file's header: which tensor lies where. No weight byte is read.

The format is 8 bytes of little-endian header length, a JSON object, then the data; see
https://huggingface.co/docs/safetensors. What the official reader lets pass but no writer writes (a name twice,
unknown fields, an empty name) is refused here.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import FormatError, PathError
from .opening import open_file
from .strict_json import parse_json

if TYPE_CHECKING:
    from .values import Values

MAX_HEADER = 100_000_000
MAX_NAME = 512
_MAX_RANK = 64
_LIMIT = 1 << 63
_FIRST_READ = 1 << 16
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_SIZED = {name: (dtype, dtype.itemsize) for name, dtype in DTYPES.items()}
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


class TensorEntry(NamedTuple):
    """One tensor of a checkpoint: ``nbytes`` bytes at ``offset`` of ``file`` (counted from the file's start).

    With ``values`` they are not its bytes there: ``offset`` is -1, and ``nbytes`` what the tensor takes once made.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    values: Values | None = None


class FileStamp(NamedTuple):
    """What must stay the same while a file is being loaded."""

    size: int
    modified_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, info: os.stat_result) -> FileStamp:
        return cls(info.st_size, info.st_mtime_ns, info.st_ino, info.st_dev)


class Header(NamedTuple):
    """Tensors of one file in the order of their bytes, its metadata and the stamp of the file they were read from."""

    file: Path
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    stamp: FileStamp


def read_header(file: str | os.PathLike[str]) -> Header:
    """Read and check the header of one safetensors file.

    Raises NotFoundError (no such file), PathError (not a regular file) or FormatError (anything that the format
    forbids, naming the file and the tensor). Never blocks on a pipe, never allocates what a header merely claims.
    """
    path = Path(file)
    raw, stamp = _read_raw(path)
    return parse_header(raw, path, stamp)


def parse_header(raw: bytes, path: Path, stamp: FileStamp) -> Header:
    """Check a header's bytes, without the 8 that say how many they are; FormatError as for `read_header`.

    Of ``stamp`` the size is needed: the tensors must fill the file.
    """
    try:
        tensors, metadata = _parse(raw, path)
        entries = _entries(tensors, path, start=8 + len(raw), size=stamp.size)
    except (KeyError, TypeError, IndexError, OverflowError) as error:  # no known way in; never leak a raw error
        raise FormatError(f"{path}: malformed safetensors header ({error!r})") from error
    return Header(path, entries, metadata, stamp)


def _read_raw(path: Path) -> tuple[bytes, FileStamp]:
    """The header's bytes and the file's stamp."""
    handle, info = open_file(path)
    with handle:
        try:
            return _read_bytes(handle, path, info.st_size), FileStamp.of(info)
        except OSError as error:
            if isinstance(error, FormatError):
                raise
            raise PathError(f"cannot read {str(path)!r}: {error.strerror}") from error


def _read_bytes(handle: Any, path: Path, size: int) -> bytes:
    head = handle.read(_FIRST_READ)
    if len(head) < 8:
        raise FormatError(f"{path} is {_what_it_is(head)}, not a safetensors file ({size} bytes); fetch it again")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER or length > size - 8 or length < 2:
        other = _what_it_is(head)
        if other:
            raise FormatError(f"{path} is {other}, not a safetensors file; fetch the real file")
        if length > MAX_HEADER:
            raise FormatError(
                f"{path}: header length {length} is over the limit of {MAX_HEADER} bytes; not safetensors?"
            )
        if length < 2:
            raise FormatError(f"{path}: header length {length} cannot hold a JSON object; not safetensors?")
        raise FormatError(
            f"{path} is truncated: its header should take {length} bytes, the file has {size}; fetch it again"
        )
    parts, have = [head[8 : 8 + length]], min(len(head) - 8, length)
    while have < length:
        part = handle.read(length - have)
        if not part:
            raise FormatError(f"{path} ended while its header was read; is it being written?")
        parts.append(part)
        have += len(part)
    return b"".join(parts) if len(parts) > 1 else parts[0]


def _what_it_is(head: bytes) -> str:
    """A file type in words if the first bytes are those of a known other one, else an empty string."""
    text = head[:256].lstrip().lower()
    if not head.strip(b"\0"):
        return "empty" if not head else "zeros" if len(head) >= 8 else "too short"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page (HTML)"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (run `git lfs pull`)"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (a torch.save or pickle file?)"
    if len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6):
        return "a pickle"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file"
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    return "too short" if len(head) < 8 else ""


def _parse(raw: bytes, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The header as an object, and its metadata taken out of it."""
    if raw[:1] != b"{":
        raise FormatError(f"{path}: the header does not start with '{{'; not a safetensors file")
    try:
        header = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: the header is not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise FormatError(f"{path}: the header is not valid JSON: {error}") from error
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    elif type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must be an object of strings")
    return header, metadata


def _entries(tensors: dict[str, Any], path: Path, *, start: int, size: int) -> dict[str, TensorEntry]:
    """Checked entries in the order of their bytes, which must follow each other and fill the file."""
    found = []
    for name, info in tensors.items():
        if type(info) is not dict or len(info) != 3:
            raise FormatError(f"{path}: tensor {name!r} needs exactly dtype, shape and data_offsets")
        try:
            code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
        except KeyError as error:
            raise FormatError(f"{path}: tensor {name!r} has no {error.args[0]}") from None
        _check_name(name, path)
        sized = _SIZED.get(code) if type(code) is str else None
        if sized is None:
            raise FormatError(f"{path}: tensor {name!r} has {_bad_dtype(code)}")
        count = _count(shape, name, path)
        if type(offsets) is not list or len(offsets) != 2:
            raise FormatError(f"{path}: data_offsets of {name!r} must be two integers, not {_shown(offsets)}")
        begin, end = offsets
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < _LIMIT:
            raise FormatError(f"{path}: data_offsets of {name!r} must be begin <= end, not {_shown(offsets)}")
        if end - begin != count * sized[1]:
            raise FormatError(
                f"{path}: tensor {name!r}, {code} of shape {tuple(shape)}, takes {count * sized[1]} bytes "
                f"but has {end - begin}"
            )
        found.append((begin, end, name, sized[0], shape))
    found.sort(key=lambda item: item[:2])
    entries = {}
    position = 0
    for begin, end, name, dtype, shape in found:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name!r} at {begin} {fault}, which ends at {position}")
        entries[name] = TensorEntry(name, dtype, tuple(shape), path, start + begin, end - begin)
        position = end
    if start + position > size:
        raise FormatError(
            f"{path} is truncated: its header promises {start + position} bytes, the file has {size}; fetch it again"
        )
    if start + position < size:
        raise FormatError(f"{path}: {size - start - position} bytes after the last tensor; damaged or not safetensors")
    return entries


def name_fault(name: str) -> str | None:
    """Why a tensor cannot have this name, in words, or None. Saving and reading refuse the same names."""
    if name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME and ".." not in name and name[0] != "_":
        return None
    if not name or len(name) > MAX_NAME:
        return f"has {len(name)} characters; 1 to {MAX_NAME} are allowed"
    if name == "__metadata__":
        return "is the name of a file's metadata"
    if _CONTROLS.search(name):
        return "holds control characters"
    if "../" in name or "..\\" in name:
        return "looks like a path"
    return None


def _check_name(name: str, path: Path) -> None:
    if fault := name_fault(name):
        raise FormatError(f"{path}: tensor name {reprlib.repr(name)} {fault}")


def _count(shape: Any, name: str, path: Path) -> int:
    """Number of elements."""
    if type(shape) is not list or len(shape) > _MAX_RANK:
        raise FormatError(f"{path}: shape of {name!r} must be at most {_MAX_RANK} integers, not {_shown(shape)}")
    for size in shape:
        if type(size) is not int or not 0 <= size < _LIMIT:
            raise FormatError(f"{path}: shape of {name!r} must be integers from 0, not {_shown(shape)}")
    count = math.prod(shape)
    if count >= _LIMIT or (count == 0 and math.prod(size for size in shape if size) >= _LIMIT):
        raise FormatError(f"{path}: shape {_shown(shape)} of {name!r} is too large")
    return count


def _bad_dtype(code: Any) -> str:
    if code in _SUB_BYTE:
        return f"dtype {code}, whose elements are smaller than a byte; that is not supported"
    return f"unknown dtype {_shown(code)}; known are {', '.join(DTYPES)}"


def _shown(value: Any) -> str:
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
