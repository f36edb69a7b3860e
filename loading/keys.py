"""From the names of a checkpoint to the names of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ..errors import ArgumentError, IntegrityError

_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def match_keys(
    names: Iterable[str],
    wanted: Collection[str],
    *,
    key_mapping: Mapping[str, str] | None = None,
    base_model_prefix: str = "",
) -> tuple[dict[str, str], dict[str, str]]:
    """Match checkpoint names to the names a model wants.

    Every rule of ``key_mapping`` (regex to replacement) is applied to every name in turn, each to its first match.
    A name that the model does not have is then tried with the legacy endings of layer norms, and without and with
    ``base_model_prefix``.

    Returns ``({model name: checkpoint name}, {checkpoint name: what it was renamed to} for those without a place)``.
    Raises IntegrityError if two names end up in one place and ArgumentError for a rule that is not a regex.
    """
    rules = _compile(key_mapping)
    prefix = f"{base_model_prefix}." if base_model_prefix else ""
    matched: dict[str, str] = {}
    left: dict[str, str] = {}
    for name in names:
        key = name
        for pattern, replacement in rules:
            key = _substitute(pattern, replacement, key)
        if key not in wanted:
            key = _other_spelling(key, wanted, prefix)
            if key not in wanted:
                left[name] = key
                continue
        if key in matched:
            raise IntegrityError(
                f"checkpoint tensors {matched[key]!r} and {name!r} both belong to the model's {key!r}; "
                "the checkpoint holds two models, or key_mapping joins them"
            )
        matched[key] = name
    return matched, left


def _compile(key_mapping: Mapping[str, str] | None) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    if key_mapping is not None and not isinstance(key_mapping, Mapping):
        raise ArgumentError(f"key_mapping must map regexes to replacements, not be a {type(key_mapping).__name__}")
    for pattern, replacement in (key_mapping or {}).items():
        if not isinstance(pattern, str) or not isinstance(replacement, str):
            raise ArgumentError(f"key_mapping must map strings to strings, not {pattern!r} to {replacement!r}")
        try:
            rules.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ArgumentError(f"key_mapping: {pattern!r} is not a regex: {error}") from error
    return rules


def _substitute(pattern: re.Pattern[str], replacement: str, key: str) -> str:
    try:
        return pattern.sub(replacement, key, count=1)
    except (re.error, IndexError) as error:
        raise ArgumentError(
            f"key_mapping: replacement {replacement!r} does not fit {pattern.pattern!r}: {error}"
        ) from error


def _other_spelling(key: str, wanted: Collection[str], prefix: str) -> str:
    for old, new in _LEGACY.items():
        if key.endswith(old):
            key = key[: -len(old)] + new
            if key in wanted:
                return key
    if prefix:
        if key.startswith(prefix) and key[len(prefix) :] in wanted:
            return key[len(prefix) :]
        if prefix + key in wanted:
            return prefix + key
    return key
