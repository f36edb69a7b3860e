"""Floor 3, how weights arrive: source -> checkpoint headers -> plan -> stream -> report; and how they are saved."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Source": "source",
    "resolve_source": "source",
    "TensorEntry": "header",
    "read_header": "header",
    "Checkpoint": "checkpoint",
    "open_checkpoint": "checkpoint",
    "Plan": "plan",
    "make_plan": "plan",
    "LoadReport": "report",
    "load_into": "load",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
