"""Floor 2, in what form weights are held: codecs, packed linear layers, methods by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AwqConfig": "awq",
    "BitsAndBytesConfig": "config",
    "GPTQConfig": "gptq",
    "Linear4bit": "linear",
    "Linear8bitLt": "linear",
    "PackedLinear": "packed",
    "Quantizer": "quantizer",
    "Recipe": "packed",
    "WeightOnlyConfig": "weight_only",
    "find_quantizer": "registry",
    "quantization_methods": "registry",
    "register_quantizer": "registry",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
