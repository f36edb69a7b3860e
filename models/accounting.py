"""What a model amounts to: parameters, bytes, tokens of a batch, operations of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .quantized import packed_numbers

if TYPE_CHECKING:
    from .causal_lm import CausalLM


def num_parameters(model: CausalLM, only_trainable: bool, exclude_embeddings: bool) -> int:
    """See `CausalLM.num_parameters`."""
    excluded, codes = packed_numbers(model) if model.is_quantized else (set(), 0)
    if exclude_embeddings:
        excluded |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return (0 if only_trainable else codes) + sum(
        p.numel() for p in model.parameters() if id(p) not in excluded and (p.requires_grad or not only_trainable)
    )


def memory_footprint(model: CausalLM, return_buffers: bool) -> int:
    """See `CausalLM.get_memory_footprint`."""
    total = sum(p.nbytes for p in model.parameters())
    return total + sum(b.nbytes for b in model.buffers()) if return_buffers else total


def tokens_of(model: CausalLM, inputs: Mapping[str, Any]) -> int:
    """See `CausalLM.estimate_tokens`."""
    if (ids := inputs.get(model.main_input_name)) is not None:
        return ids.numel()
    embeds = inputs.get("inputs_embeds")
    return 0 if embeds is None else embeds[..., 0].numel()
