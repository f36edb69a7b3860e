"""What a model amounts to: parameters, bytes, tokens of a batch, operations of a step; methods of `CausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .quantized import packed_numbers

if TYPE_CHECKING:
    from .causal_lm import CausalLM


def num_parameters(model: CausalLM, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Number of parameters, tied ones counted once; codes count as the numbers they stand for."""
    excluded, codes = packed_numbers(model) if model.is_quantized else (set(), 0)
    if exclude_embeddings:
        excluded |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return (0 if only_trainable else codes) + sum(
        p.numel() for p in model.parameters() if id(p) not in excluded and (p.requires_grad or not only_trainable)
    )


def get_memory_footprint(model: CausalLM, return_buffers: bool = True) -> int:
    """Bytes of parameters and, unless told not to, buffers; tied ones counted once."""
    total = sum(p.nbytes for p in model.parameters())
    return total + sum(b.nbytes for b in model.buffers()) if return_buffers else total


def estimate_tokens(model: CausalLM, input_dict: Mapping[str, Any]) -> int:
    """Tokens of a batch, padding counted: of ``input_ids``, else of ``inputs_embeds``, else 0."""
    if (ids := input_dict.get(model.main_input_name)) is not None:
        return ids.numel()
    embeds = input_dict.get("inputs_embeds")
    return 0 if embeds is None else embeds[..., 0].numel()


def floating_point_ops(model: CausalLM, input_dict: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
    """About how many operations training takes on a batch: 6 a parameter and token, attention's not counted."""
    return 6 * model.estimate_tokens(input_dict) * model.num_parameters(exclude_embeddings=exclude_embeddings)
