"""Typed configuration fields: what a value may be, checked when it is set."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Union, get_args, get_origin

import torch

from ..errors import ConfigError, nearest

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
}
_DTYPE_ALIASES = {"float": "float32", "half": "float16", "double": "float64", "fp32": "float32", "fp16": "float16"}
_DTYPE_ALIASES["bf16"] = "bfloat16"
_MOST_BITS = 63  # of whole numbers, which become numbers of tensors


def ranged(
    default: Any = dataclasses.MISSING,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field whose value must lie in ``[minimum, maximum]``, be > ``above``, or be one of ``choices``."""
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata={key: v for key, v in limits.items() if v is not None})


def parse_dtype(value: Any, *, where: str = "dtype") -> torch.dtype:
    """A floating-point torch dtype from itself or its name ("bfloat16", "torch.bfloat16", "bf16").

    Raises ConfigError for anything else; names are looked up in a fixed list, never in a module.
    """
    if isinstance(value, torch.dtype):
        if value not in _DTYPES.values():
            raise ConfigError(f"{where}={value} is not a floating-point dtype; use one of {', '.join(_DTYPES)}")
        return value
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        found = _DTYPES.get(_DTYPE_ALIASES.get(name, name))
        if found is not None:
            return found
        raise ConfigError(f"{where}={value!r} is not a dtype{nearest(name, _DTYPES)} known: {', '.join(_DTYPES)}")
    raise ConfigError(f"{where} must be a torch dtype or its name, got {value!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` → ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def check_value(owner: str, name: str, value: Any, annotation: Any, metadata: Any) -> Any:
    """Return ``value``, an int made float where a float is meant. Raises ConfigError naming owner, field and value."""
    if type(value) is int and value.bit_length() > _MOST_BITS:
        raise ConfigError(f"{owner}.{name} is a whole number of {value.bit_length()} bits; {_MOST_BITS} are the most")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{owner}.{name} must be finite, got {value}")
    if not _matches(value, annotation):
        raise ConfigError(f"{owner}.{name} must be {_describe(annotation)}, got {value!r} ({type(value).__name__})")
    if metadata and value is not None:
        _check_range(owner, name, value, metadata)
    if isinstance(value, int) and not isinstance(value, bool) and _wants_float(annotation):
        return float(value)
    return value


def _check_range(owner: str, name: str, value: Any, metadata: Any) -> None:
    if (choices := metadata.get("choices")) is not None:
        if value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise ConfigError(f"{owner}.{name}={value!r} is not known{hint} choose from {', '.join(choices)}")
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    minimum, maximum, above = (metadata.get(key) for key in ("minimum", "maximum", "above"))
    if minimum is not None and value < minimum:
        raise ConfigError(f"{owner}.{name} must be at least {minimum}, got {value}")
    if above is not None and value <= above:
        raise ConfigError(f"{owner}.{name} must be greater than {above}, got {value}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{owner}.{name} must be at most {maximum}, got {value}")


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _wants_float(annotation: Any) -> bool:
    members = _members(annotation)
    return float in members and int not in members


def _matches(value: Any, annotation: Any) -> bool:
    return any(_matches_one(value, member) for member in _members(annotation))


def _matches_one(value: Any, member: Any) -> bool:
    if member is Any:
        return True
    if member in (None, type(None)):
        return value is None
    if member is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= _MOST_BITS
    origin = get_origin(member)
    if origin in (list, tuple):
        inner = get_args(member)
        return isinstance(value, (list, tuple)) and (not inner or all(_matches(item, inner[0]) for item in value))
    if origin is dict:
        return isinstance(value, dict)
    return isinstance(value, member) if isinstance(member, type) else True


def _describe(annotation: Any) -> str:
    names = {type(None): "None", float: "a number", int: "an integer", bool: "true or false", str: "a string"}
    return " or ".join(str(names.get(member, getattr(member, "__name__", member))) for member in _members(annotation))
