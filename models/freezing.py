"""Which parameters a training changes, chosen by patterns on their names; methods of `CausalLM`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import ArgumentError, nearest
from ..quant.packed import refuse_training
from .quantized import packed_numbers

if TYPE_CHECKING:
    from .causal_lm import CausalLM


def freeze(model: CausalLM, *patterns: str) -> list[str]:
    r"""Train the parameters no more in whose names any of the regular expressions is found; all without one.

    ``model.freeze("embed_tokens", r"layers\.[0-3]\.")``; a tied parameter goes by each of its names.
    Returns the names. Raises ArgumentError for a pattern that fits nothing.
    """
    return _set_trainable(model, patterns, False)


def unfreeze(model: CausalLM, *patterns: str) -> list[str]:
    """Undo `freeze`, for the same patterns or others. Raises QuantizationError for codes: they have no gradient."""
    return _set_trainable(model, patterns, True)


def _set_trainable(model: CausalLM, patterns: tuple[str, ...], trainable: bool) -> list[str]:
    every = dict(model.named_parameters(remove_duplicate=False))  # a tied parameter goes by each of its names
    chosen = {name: every[name] for pattern in patterns or ("",) for name in _found(pattern, list(every))}
    codes = packed_numbers(model)[0] if trainable and model.is_quantized else set()
    if any(id(parameter) in codes for parameter in chosen.values()):
        refuse_training()
    for parameter in chosen.values():
        parameter.requires_grad_(trainable)
    return sorted(chosen)


def _found(pattern: str, names: list[str]) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"{pattern!r} is not a regular expression: {error}") from error
    if found := [name for name in names if expression.search(name)]:
        return found
    raise ArgumentError(f"no parameter's name holds {pattern!r}{nearest(pattern, names)}")
