"""Attention written out: the reference, and the implementation that can return its weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .mask import AttentionMask


def eager_attention(
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
    """See `attention`. Holds the (batch, heads, query_length, key_length) scores in memory."""
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1], key.shape[2]
    if kv_heads != heads:  # query heads of one group become rows of one product: keys are never repeated
        query = query.reshape(batch, kv_heads, (heads // kv_heads) * query_length, head_dim)
    if score_precision == "scores":
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query.float(), key.float().transpose(2, 3))
    else:
        scores = torch.matmul(query, key.transpose(2, 3))
    scores = scores.view(batch, heads, query_length, key_length) * scaling
    bias = mask.bias(scores.dtype)
    if bias is not None:
        scores = scores + bias
    weights = F.softmax(scores, dim=-1, dtype=torch.float32 if score_precision == "softmax" else None)
    weights = weights.to(value.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    grouped = weights.view(batch, kv_heads, -1, key_length) if kv_heads != heads else weights
    output = torch.matmul(grouped, value).view(batch, heads, query_length, head_dim)
    return output, weights if output_attentions else None
