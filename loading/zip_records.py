"""Where the records of a zip archive lie in the file, if they are stored as they are: torch.save compresses nothing.

Stricter than zip requires: a record is believed only where the directory at the end and the header before the record
agree, and no two records may overlap.
Source: PKWARE's APPNOTE 6.3, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ..errors import FormatError
from .regular import RegularFile

_MAX_DIRECTORY = 100_000_000  # bytes
_MOST_RECORDS = 1 << 18
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 1


class Record(NamedTuple):
    """Bytes of one record: ``begin`` in the file, and how many."""

    begin: int
    nbytes: int


def zip_records(file: RegularFile) -> dict[str, Record]:
    """The records by name. Raises FormatError for an archive that is damaged, lies, or is compressed or encrypted."""
    count, size, begin = _directory(file)
    if size > _MAX_DIRECTORY or count * _ENTRY.size > size or count > _MOST_RECORDS:
        raise FormatError(f"{file.path}: a zip directory of {size} bytes for {count} records cannot be")
    directory = file.read(begin, size)
    records: dict[str, Record] = {}
    position = 0
    for _ in range(count):
        try:
            name, record, position = _entry(file, directory, position)
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            raise FormatError(f"{file.path}: the directory of the zip archive is damaged ({error})") from error
        if name in records:
            raise FormatError(f"{file.path}: the record {name!r} is there twice")
        records[name] = record
    _check_overlap(file, records, begin)
    return records


def _directory(file: RegularFile) -> tuple[int, int, int]:
    """Number of entries, bytes and begin of the archive's directory."""
    tail = file.read(max(0, file.size - _END.size - _FULL16), min(file.size, _END.size + _FULL16))
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        raise FormatError(f"{file.path}: the end of the zip archive is missing; the file is truncated, fetch it again")
    _, disk, first, here, count, size, begin, _ = _END.unpack_from(tail, found)
    place = file.size - len(tail) + found
    if _FULL16 in (here, count) or _FULL32 in (size, begin):
        locator = file.read(place - _LOCATOR.size, _LOCATOR.size) if place >= _LOCATOR.size else b""
        if locator[:4] == b"PK\6\7":
            place = _LOCATOR.unpack(locator)[2]
            mark, _, _, _, disk, first, here, count, size, begin = _END64.unpack(file.read(place, _END64.size))
            if mark != b"PK\6\6":
                raise FormatError(f"{file.path}: the end of the zip archive (zip64) is damaged")
    if disk or first or here != count or begin + size > place:
        raise FormatError(f"{file.path}: the end of the zip archive contradicts itself; fetch the file again")
    return count, size, begin


def _entry(file: RegularFile, directory: bytes, position: int) -> tuple[str, Record, int]:
    """One record by the directory, checked against the header before its bytes; and the position of the next."""
    fields = _ENTRY.unpack_from(directory, position)
    mark, flags, method = fields[0], fields[3], fields[4]
    packed, size, name_size, extra_size, note_size, begin = *fields[8:13], fields[16]
    if mark != b"PK\1\2":
        raise FormatError(f"{file.path}: the directory of the zip archive is damaged")
    position += _ENTRY.size
    raw = directory[position : position + name_size]
    name = raw.decode("utf-8")
    extra = directory[position + name_size : position + name_size + extra_size]
    if _FULL32 in (packed, size, begin):
        packed, size, begin = _large(extra, packed, size, begin)
    if method or packed != size or flags & _ENCRYPTED:
        raise FormatError(f"{file.path}: the record {name!r} is compressed or encrypted; torch.save does neither")
    local = _LOCAL.unpack(file.read(begin, _LOCAL.size))
    start = begin + _LOCAL.size
    if local[0] != b"PK\3\4" or local[3] or file.read(start, local[9]) != raw:
        raise FormatError(f"{file.path}: the record {name!r} is not where the directory of the zip archive says")
    start += local[9] + local[10]
    if start + size > file.size:
        raise FormatError(f"{file.path} is truncated: the record {name!r} ends at {start + size}; fetch it again")
    return name, Record(start, size), position + name_size + extra_size + note_size


def _large(extra: bytes, packed: int, size: int, begin: int) -> tuple[int, int, int]:
    """The numbers that did not fit 32 bits, from the zip64 field, in which they follow each other."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, position))
            found = [next(numbers, _FULL32) if value == _FULL32 else value for value in (size, packed, begin)]
            return found[1], found[0], found[2]
        position += length
    return packed, size, begin


def _check_overlap(file: RegularFile, records: dict[str, Record], end: int) -> None:
    position, before = 0, ""
    for name, record in sorted(records.items(), key=lambda item: item[1]):
        if record.begin < position or record.begin + record.nbytes > end:
            raise FormatError(f"{file.path}: the record {name!r} overlaps {before or 'the directory'!r}")
        position, before = record.begin + record.nbytes, name
