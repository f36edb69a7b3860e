"""JSON without the liberties that Python's reader takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import LoadstoneError, PathError
from .opening import open_file

MAX_DEPTH = 64
_SPACED_COLON = re.compile(r'"[ \t\r\n]+:')
_SMALL = 1 << 20  # characters that may be anything
_BYTES_A_BRACKET = 8
_MOST_BITS = 1000  # files of tokenizers say 10**30 where they mean no limit


def parse_json(text: str) -> Any:
    """``json.loads``, but NaN, Infinity and a name that is twice in one object are refused, with a ValueError.

    So is a large text of little but brackets: an empty list takes thirty times the memory of its two characters.
    """
    if len(text) > _SMALL and (text.count("[") + text.count("{")) * _BYTES_A_BRACKET > len(text):
        raise ValueError("it holds little but brackets")
    try:
        content = json.loads(text, parse_constant=_constant)
        if not _has_no_duplicates(text, content):
            content = json.loads(text, parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return content


def parse_plain(text: str) -> Any:
    """`parse_json` for configurations, which are copied, compared and written back.

    Also refused: more than `MAX_DEPTH` levels, whole numbers that no float holds, numbers that overflow to infinity,
    and halves of surrogate pairs, which are no text.
    """
    content = parse_json(text)
    level, depth = [content], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value)
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            else:
                _check_plain(value)
        level, depth = inner, depth + 1
    return content


def read_json_file(path: Path, *, limit: int, error: type[LoadstoneError], what: str) -> Any:
    """The content of a JSON file of a checkpoint, UTF-8 with or without a byte order mark.

    Raises NotFoundError, PathError (not a regular file, not readable), or ``error`` naming the file: more than
    ``limit`` bytes, not UTF-8, not JSON, or what `parse_plain` refuses. what: the kind of file, for messages.
    """
    handle, info = open_file(path)
    with handle:
        if info.st_size > limit:
            raise error(f"{path} has {info.st_size} bytes; {what} is at most {limit}")
        try:
            data = read_up_to(handle, limit + 1)
        except OSError as failure:
            raise PathError(f"cannot read {str(path)!r}: {failure.strerror}") from failure
    if len(data) > limit:  # it grows, or its size was a lie
        raise error(f"{path} has more than {limit} bytes; {what} is at most that")
    try:
        return parse_plain(data.decode("utf-8-sig"))
    except ValueError as failure:
        raise error(f"{path} is not valid JSON: {failure}") from failure


def read_up_to(handle: Any, count: int) -> bytes:
    """At most ``count`` bytes of an unbuffered file, fewer only where it ends."""
    parts, have = [], 0
    while have < count and (part := handle.read(min(count - have, 1 << 20))):
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def _check_plain(value: Any) -> None:
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise ValueError(f"a whole number of {value.bit_length()} bits; {_MOST_BITS} are the most")
    if type(value) is float and value - value != 0:
        raise ValueError("a number that is too large")
    if type(value) is str and not value.isascii():
        value.encode()  # UnicodeEncodeError is a ValueError


def _has_no_duplicates(text: str, content: Any) -> bool:
    """Whether it is plain that no name is repeated; much cheaper than a look at each object while it is read.

    Without backslashes each name ends in a quote and a colon, so there are at least as many of these as names. If
    there are no more than the names that were kept, none was dropped.
    """
    if type(content) is not dict or "\\" in text:
        return False
    kept = len(content) + sum(len(value) for value in content.values() if type(value) is dict)
    return text.count('":') == kept and _SPACED_COLON.search(text) is None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} is there twice")
            seen.add(name)
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
