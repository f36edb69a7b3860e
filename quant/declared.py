"""What a checkpoint or a caller says about quantization."""

from __future__ import annotations

from typing import Any

from ..errors import QuantizationError


def declared_method(quantization_config: Any) -> str | None:
    """The ``quant_method`` a configuration names (a JSON object or an object with that attribute), None for none.

    Raises QuantizationError for one that names no method.
    """
    if quantization_config is None:
        return None
    if isinstance(quantization_config, dict):
        method = quantization_config.get("quant_method")
        if method is None and (quantization_config.get("load_in_4bit") or quantization_config.get("load_in_8bit")):
            method = "bitsandbytes"
    else:
        method = getattr(quantization_config, "quant_method", None)
    if method is None:
        raise QuantizationError(f"quantization_config names no quant_method: {quantization_config!r}")
    return str(getattr(method, "value", method))


def refuse_quantized(name: str, of_checkpoint: Any, of_caller: Any) -> None:
    """Raise QuantizationError if the checkpoint ``name`` or its caller declares a quantization method."""
    if (method := declared_method(of_checkpoint)) is not None:
        raise QuantizationError(
            f"{name} is quantized with {method!r}, which this version of loadstone cannot read; "
            "load the full-precision checkpoint it was made from"
        )
    if (method := declared_method(of_caller)) is not None:
        raise QuantizationError(
            f"quantization_config asks for {method!r}, which this version of loadstone does not have; "
            "load in full precision with dtype=torch.bfloat16"
        )
