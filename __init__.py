"""loadstone: causal language models by name, loaded at the limit of the hardware.

    from loadstone import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")

Names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels import AttentionMask, Kernels, register_attention, register_kernel
    from .loading.parallel_mesh import ParallelConfig
    from .loading.report import LoadReport
    from .models.adapters.config import LoraConfig
    from .models.cache import Cache, DynamicCache, StaticCache
    from .models.causal_lm import CausalLM
    from .models.configuration import PreTrainedConfig
    from .models.generation import GenerationConfig
    from .models.gpt2 import GPT2Config, GPT2LMHeadModel
    from .models.llama import LlamaConfig, LlamaForCausalLM
    from .models.mistral import MistralConfig, MistralForCausalLM
    from .models.outputs import CausalLMOutputWithPast
    from .models.parallel_adapters import shard_new_weights
    from .quant.config import BitsAndBytesConfig
    from .quant.linear import Linear4bit, Linear8bitLt
    from .quant.registry import register_quantizer
    from .quant.weight_only import WeightOnlyConfig
    from .registry import AutoConfig, AutoModelForCausalLM, list_architectures, register, register_causal_lm
    from .registry.convert import convert_checkpoint

__version__ = "0.1.0"

_HOME = {
    "AttentionMask": ".kernels",
    "AutoConfig": ".registry",
    "AutoModelForCausalLM": ".registry",
    "BitsAndBytesConfig": ".quant.config",
    "Cache": ".models.cache",
    "CausalLM": ".models.causal_lm",
    "CausalLMOutputWithPast": ".models.outputs",
    "DynamicCache": ".models.cache",
    "GPT2Config": ".models.gpt2",
    "GPT2LMHeadModel": ".models.gpt2",
    "GenerationConfig": ".models.generation",
    "Kernels": ".kernels",
    "Linear4bit": ".quant.linear",
    "Linear8bitLt": ".quant.linear",
    "LlamaConfig": ".models.llama",
    "LlamaForCausalLM": ".models.llama",
    "LoadReport": ".loading.report",
    "LoraConfig": ".models.adapters.config",
    "MistralConfig": ".models.mistral",
    "MistralForCausalLM": ".models.mistral",
    "ParallelConfig": ".loading.parallel_mesh",
    "PreTrainedConfig": ".models.configuration",
    "StaticCache": ".models.cache",
    "WeightOnlyConfig": ".quant.weight_only",
    "convert_checkpoint": ".registry.convert",
    "list_architectures": ".registry",
    "register": ".registry",
    "register_attention": ".kernels",
    "register_causal_lm": ".registry",
    "register_kernel": ".kernels",
    "register_quantizer": ".quant.registry",
    "shard_new_weights": ".models.parallel_adapters",
}

__all__ = [
    "AttentionMask",
    "AutoConfig",
    "AutoModelForCausalLM",
    "BitsAndBytesConfig",
    "Cache",
    "CausalLM",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "GPT2Config",
    "GPT2LMHeadModel",
    "GenerationConfig",
    "Kernels",
    "Linear4bit",
    "Linear8bitLt",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LoadReport",
    "LoraConfig",
    "MistralConfig",
    "MistralForCausalLM",
    "ParallelConfig",
    "PreTrainedConfig",
    "StaticCache",
    "WeightOnlyConfig",
    "convert_checkpoint",
    "list_architectures",
    "register",
    "register_attention",
    "register_causal_lm",
    "register_kernel",
    "register_quantizer",
    "shard_new_weights",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'loadstone' has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
