"""``loadstone list``: the registered architectures."""

from __future__ import annotations

import argparse

from ..errors import UnsupportedModelError
from ..registry.table import Architecture, list_architectures
from .output import Output, print_json


def run(arguments: argparse.Namespace) -> None:
    """Print the rows that match the pattern. Raises UnsupportedModelError if none does."""
    rows = list_architectures(arguments.pattern)
    if not rows:
        known = ", ".join(row.model_type for row in list_architectures())
        raise UnsupportedModelError(f"no architecture matches {arguments.pattern!r}; registered: {known}")
    if arguments.json:
        print_json([_describe(row) for row in rows])
        return
    table = [[row["model_type"] or "", row["config"] or "", row["model"] or "none yet", row["origin"] or ""]
             for row in map(_describe, rows)]  # fmt: skip
    Output().table(["model_type", "configuration", "model", "origin"], table)


def _describe(row: Architecture) -> dict[str, str | None]:
    return {
        "model_type": row.model_type,
        "config": _name(row.config),
        "model": _name(row.model) if row.model is not None else None,
        "origin": row.origin,
    }


def _name(given: type | str) -> str:
    """The name of a class that may not be imported yet."""
    return given.rpartition(":")[2] if isinstance(given, str) else given.__qualname__
