"""Mistral: a Llama without biases, with grouped keys and a sliding attention window.

Notable: a query sees the last ``sliding_window`` tokens, its own included; None (Mistral 7B v0.2 and later) sees all.
Source: Jiang et al. 2023, arXiv:2310.06825.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from .fields import ranged
from .llama import LlamaConfig, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


class MistralConfig(LlamaConfig):
    """Sizes and options of a Mistral; the defaults are Mistral 7B v0.1's."""

    model_type: ClassVar[str] = "mistral"

    intermediate_size: int = ranged(14336, minimum=1, maximum=1 << 22)
    num_key_value_heads: int | None = ranged(8, minimum=1)
    max_position_embeddings: int = ranged(131072, minimum=1, maximum=1 << 60)
    sliding_window: int | None = ranged(4096, minimum=1, maximum=1 << 60)


class MistralDecoderLayer(LlamaDecoderLayer):
    """A Llama layer; the window is in the mask it is given."""


class MistralModel(LlamaModel):
    """Token embedding, decoder layers, final norm."""

    layer_class: ClassVar[type[nn.Module]] = MistralDecoderLayer


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral with a language-modelling head."""

    config_class = MistralConfig
    model_class: ClassVar[type[LlamaModel]] = MistralModel
    _no_split_modules = ["MistralDecoderLayer"]
