"""Values of the command line, parsed and checked; argparse turns ArgumentTypeError into a usage message."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from typing import Any

_LARGEST = (1 << 63) - 1


def number(text: str) -> int:
    """A whole number from 0."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= _LARGEST:
        raise ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return value


def positive(text: str) -> int:
    """A whole number from 1."""
    value = number(text)
    if value < 1:
        raise ArgumentTypeError("must be at least 1")
    return value


def device_map(text: str) -> Any:
    """A device, its number, the name of a strategy, or a JSON object of module names and devices."""
    if text.isdecimal():
        return int(text)
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"not a JSON object: {error}") from error


def memory(text: str) -> list[tuple[int | str, str]]:
    """``0=20GiB`` or ``0=20GiB,cpu=60GiB``: devices and sizes."""
    pairs: list[tuple[int | str, str]] = []
    for word in text.split(","):
        device, equals, size = (part.strip() for part in word.partition("="))
        if not (device and equals and size):
            raise ArgumentTypeError(f"{word!r} is not DEVICE=SIZE, as in 0=20GiB or cpu=60GiB")
        pairs.append((int(device) if device.isdecimal() else device, size))
    return pairs
