"""JSON without the liberties that Python's reader takes."""

from __future__ import annotations

import json
import re
from typing import Any

_SPACED_COLON = re.compile(r'"[ \t\r\n]+:')


def parse_json(text: str) -> Any:
    """``json.loads``, but NaN, Infinity and a name that is twice in one object are refused, with a ValueError."""
    try:
        content = json.loads(text, parse_constant=_constant)
        if not _has_no_duplicates(text, content):
            content = json.loads(text, parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return content


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
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
