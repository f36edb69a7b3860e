"""Attention through torch's scaled_dot_product_attention, which picks a fused kernel of its own."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..errors import AttentionError
from .mask import AttentionMask


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scaling: float,
    dropout: float = 0.0,
    score_precision: str = "softmax",
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `attention`. Never holds the weights, so ``output_attentions`` raises AttentionError."""
    if output_attentions:
        raise AttentionError(
            "attention weights were asked for and 'sdpa' does not hold them; "
            "load with attn_implementation='eager' or call model.set_attn_implementation('eager')"
        )
    batch, heads, query_length, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = kv_heads != heads
    if grouped and query_length == 1:
        # One new token: the query heads of a group become rows, so that no key is repeated or read twice.
        allowed = mask.allowed() if mask.dense is None else None
        if mask.dense is None and (allowed is None or allowed.shape[1] == 1):
            rows = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
            output = F.scaled_dot_product_attention(
                rows, key, value, attn_mask=allowed, dropout_p=dropout, scale=scaling
            )
            return output.reshape(batch, heads, 1, head_dim), None
    causal = False
    attn_mask: Tensor | None = None
    if mask.is_causal_only and query_length > 1:
        causal = True  # a branch, not the condition: compilers that trace sizes as symbols have no plain bool there
    elif mask.dense is not None and not mask.dense.dtype.is_floating_point:
        attn_mask = mask.dense
    elif mask.dense is not None:
        attn_mask = mask.dense.to(query.dtype)
    else:
        attn_mask = mask.allowed()
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    return output, None
