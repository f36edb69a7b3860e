"""Linear layers of a model exchanged for packed ones, by name, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import QuantizationError
from .packed import PackedLinear, holds_in_out

_ENTRY = re.compile(r"[\w.*-]+")
_MOST_STARS = 4
Convert = Callable[[str, nn.Module], PackedLinear | None]


def replace_linears(model: nn.Module, convert: Convert, skip: Sequence[str] = ()) -> list[str]:
    """Put ``convert(name, layer)`` in the place of every linear layer; the names of those replaced.

    Linear layers are nn.Linear, subclasses that multiply as it does, and classes that say ``weight_is_in_out = True``
    (GPT-2's Conv1D). Left alone are names in ``skip`` (`skips`), layers for which ``convert`` returns None, and one
    that stands at several places. Raises QuantizationError if nothing was replaced, or an entry of ``skip`` is wrong.
    """
    patterns = [_pattern(entry) for entry in skip]
    homes: dict[int, list[tuple[str, nn.Module, str]]] = {}
    layers: dict[int, nn.Module] = {}
    for path, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None and is_linear(child):
                name = f"{path}.{attribute}" if path else attribute
                layers[id(child)] = child
                homes.setdefault(id(child), []).append((name, parent, attribute))
    replaced = []
    for key, places in homes.items():
        name, parent, attribute = places[0]
        if len(places) > 1 or any(pattern.match(name) for pattern in patterns):
            continue
        packed = convert(name, layers[key])
        if packed is not None:
            parent._modules[attribute] = packed
            replaced.append(name)
    if not replaced:
        raise QuantizationError(
            f"{type(model).__name__} has no linear layer to quantize"
            + (f" besides those left out: {', '.join(skip)}" if skip else "")
        )
    return replaced


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer in floating point, whose forward is the product and nothing else."""
    if isinstance(module, PackedLinear):
        return False
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or holds_in_out(module)


def skips(entry: str, name: str) -> bool:
    """Whether an entry of a skip list covers a module's name.

    It does if it fits the name from its start up to a dot or its end, or from after a dot to its end: "q_proj" covers
    "layers.0.q_proj", "layers.1" does not cover "layers.11". A "*" stands for anything. Raises QuantizationError for an
    entry that is no such pattern: lists come from files too, so they are not run as regular expressions.
    """
    return _pattern(entry).match(name) is not None


def _pattern(entry: str) -> re.Pattern[str]:
    if not _ENTRY.fullmatch(entry) or entry.count("*") > _MOST_STARS:
        raise QuantizationError(
            f"{entry!r} in a list of modules to skip is not a module's name, in which '*' stands for anything; "
            "regular expressions are not run"
        )
    body = ".*".join(re.escape(part) for part in entry.split("*"))
    return re.compile(rf"{body}(?:(?<=\.)|\.|$)|(?:.*\.)?{body}$")


def dequantize_linears(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Put plain layers with the decoded weights in the place of all packed ones; the names of those replaced."""
    replaced = []
    for path, parent in list(model.named_modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, PackedLinear):
                plain = child.dequantize(dtype)
                if (hook := getattr(child, "_hf_hook", None)) is not None:  # carries activations between devices
                    from accelerate.hooks import add_hook_to_module

                    add_hook_to_module(plain, hook)
                for table, hooks in vars(child).items():  # and what else hangs on the layer, whoever put it there
                    if table.startswith("_forward") and "hooks" in table:
                        vars(plain)[table].update(hooks)
                parent._modules[attribute] = plain
                replaced.append(f"{path}.{attribute}" if path else attribute)
    return replaced
