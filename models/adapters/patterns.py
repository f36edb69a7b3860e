"""Regular expressions out of files: only those whose time grows slowly with the text are run."""

from __future__ import annotations

import re

from ...errors import ConfigError

_LONGEST = 2000
_MOST_OPEN = 6
_REPEAT = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")


def linear_pattern(text: str, what: str) -> re.Pattern[str]:
    """The compiled expression. ConfigError if it is none, or could take exponential time.

    Python's matcher tries every way to share a text out over a repeated group whose inside can vary too, as in
    ``(a+)+`` or ``(a|a)*``. Such groups are refused, as are more than six open repetitions and texts over 2000 letters.
    """
    if len(text) > _LONGEST:
        raise ConfigError(f"{what} has {len(text)} letters; a regular expression has at most {_LONGEST}")
    try:
        compiled = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{what}={text!r} is no regular expression: {error}") from error
    fault = _fault(text)
    if fault:
        raise ConfigError(f"{what}={text!r} {fault}, which can take for ever to match; list the names instead")
    return compiled


def _fault(text: str) -> str | None:
    """What could make the expression slow, in words."""
    varies = [False]  # for each open group: whether its inside can match in several ways
    opened, place = 0, 0
    closed: bool | None = None  # whether the group that just ended varies
    while place < len(text):
        letter = text[place]
        repeat = _REPEAT.match(text, place)
        if repeat and place and text[place - 1] != "(":
            endless = letter in "*+" or (repeat[2] == "," and not repeat[3])
            often = endless or int(repeat[3] or repeat[1] or 1) > 1
            if closed and often:
                return "repeats a group that can match in several ways"
            opened += endless
            varies[-1] = varies[-1] or letter != "{" or repeat[2] == ","
            place = repeat.end()
            continue
        closed = None
        if letter == "\\":
            if text[place + 1 : place + 2].isdigit():
                return "refers back to a group"
            place += 1
        elif letter == "[":
            place = text.index("]", place + (3 if text[place + 1] == "^" else 2))
        elif letter == "(":
            varies.append(False)
        elif letter == ")":
            closed = varies.pop()
            varies[-1] = varies[-1] or closed
        elif letter == "|":
            varies[-1] = True
        place += 1
    return f"has {opened} open repetitions" if opened > _MOST_OPEN else None
