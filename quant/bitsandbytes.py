"""The built-in method "bitsandbytes": NF4, FP4 and LLM.int8() layers for what `BitsAndBytesConfig` asks."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import BitsAndBytesConfig
from .linear import Linear4bit, Linear8bitLt
from .packed import PackedLinear
from .quantizer import Quantizer


def bitsandbytes_quantizer(config: BitsAndBytesConfig, pre_quantized: bool = False) -> Quantizer:
    """The quantizer for the bits that a configuration chooses."""
    return (Quantizer4bit if config.load_in_4bit else Quantizer8bit)(config, pre_quantized)


class _Bitsandbytes(Quantizer):
    config: BitsAndBytesConfig

    def skipped_by_place(self, places: dict[str, Any]) -> list[str]:
        """What goes to the CPU, if ``llm_int8_enable_fp32_cpu_offload``."""
        if not self.config.llm_int8_enable_fp32_cpu_offload:
            return []
        return [name for name, device in places.items() if name and str(device) in ("cpu", "disk")]


class Quantizer4bit(_Bitsandbytes):
    """NF4 or FP4."""

    bits = 4

    def convert(self, name: str, layer: nn.Module) -> PackedLinear:
        """A `Linear4bit` of the configuration's options."""
        return Linear4bit.from_linear(
            layer,
            compute_dtype=self.config.bnb_4bit_compute_dtype,
            compress_statistics=self.config.bnb_4bit_use_double_quant,
            quant_type=self.config.bnb_4bit_quant_type,
            quant_storage=self.config.bnb_4bit_quant_storage,
            blocksize=self.config.blocksize,
        )


class Quantizer8bit(_Bitsandbytes):
    """LLM.int8()."""

    bits = 8

    def convert(self, name: str, layer: nn.Module) -> PackedLinear:
        """A `Linear8bitLt` of the configuration's threshold."""
        return Linear8bitLt.from_linear(layer, threshold=self.config.llm_int8_threshold)
