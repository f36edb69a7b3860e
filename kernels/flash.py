"""Flash attention as an operation: the public calls, and the reference written out in torch.

In Triton no score is ever held in memory; in torch the (query_length, key_length) scores are, which is what makes it
the reference and not an implementation to run long texts with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionError
from . import philox, support
from .dispatch import AUTO, Kernels, declare, dispatch
from .mask import AttentionMask
from .visibility import Visibility, allowed, intervals, of_mask, packed

_TRITON = Kernels("triton")


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    query_start: int | Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    kernels: Kernels = AUTO,
) -> Any:
    """Scaled dot-product attention that never holds the scores (Dao et al. 2022, arXiv:2205.14135; Dao 2023,
    arXiv:2307.08691), differentiable once, the same bits every time.

    query: (batch, heads, query_length, head_dim); key, value: (batch, kv_heads, key_length, head_dim), kv_heads a
        divisor of heads; any strides, one dtype. In Triton bf16, fp16 or fp32 and head_dim of up to 256. Products of
        bf16 and fp16 accumulate in fp32; fp32 is multiplied in fp32, or in TF32 where
        ``torch.backends.cuda.matmul.allow_tf32`` says so. Under autocast all three are cast to its dtype.
    scaling: factor on query · key, default head_dim ** -0.5. softcap: scores become cap * tanh(score / cap).
    causal: a query sees its own key and those before it; ``window``: and no more than ``window`` keys back, its own
        included. query_start: place of the first query's own key (an int, or a 0-dim tensor on the device); default
        key_length - query_length, so that the last query sits at the last key.
    key_start, key_end: (batch,), integer: keys outside ``key_start <= key < key_end`` are hidden (padding).
    dropout: probability on the weights. seed: (1,), int64, on the device; the same seed drops the same weights
        whatever the device or the kernel; None draws one from torch's generator.
    Returns the output in the shape and dtype of query, 0 for queries that see nothing; with ``return_lse`` the pair
        (output, log-sum-exp (batch, heads, query_length), fp32, natural, -inf for queries that see nothing).
    Raises AttentionError for shapes or options that make no sense, KernelError if Triton is asked for where it cannot
        run or with what it does not take.
    """
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, window, softcap, dropout)
    if query.dim() != 4:
        raise AttentionError(f"query must be (batch, heads, query_length, head_dim), got {tuple(query.shape)}")
    if key.shape[0] != query.shape[0]:
        raise AttentionError(f"query has a batch of {query.shape[0]}, key of {key.shape[0]}")
    visibility = intervals(
        query.shape[2],
        key.shape[2],
        query_start=key.shape[2] - query.shape[2] if query_start is None else query_start,
        causal=causal,
        window=window or 0,
        key_start=key_start,
        key_end=key_end,
        device=query.device,
    )
    output, lse = _attend(query, key, value, visibility, seed, scaling, softcap, dropout, kernels)
    return (output, lse) if return_lse else output


def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    scaling: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    kernels: Kernels = AUTO,
) -> Any:
    """`flash_attention` of sequences packed one after the other, which do not see each other; no mask is made and no
    length is waited for.

    query: (tokens, heads, head_dim); key, value: (key_tokens, kv_heads, head_dim). cu_seqlens_q, cu_seqlens_k:
        (sequences + 1,), int32 or int64, on the device: 0 and the ends of the sequences; cu_seqlens_k is cu_seqlens_q
        by default. With ``causal`` the last query of a sequence sits at its last key.
    Returns (tokens, heads, head_dim), with ``return_lse`` also (heads, tokens). Options and errors as there.
    """
    query, key, value = _autocast(query, key, value)
    if query.dim() != 3 or key.dim() != 3:
        raise AttentionError(
            f"packed query and key must be (tokens, heads, head_dim), got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] < 2:
        raise AttentionError(
            "cu_seqlens_q and cu_seqlens_k must both be (sequences + 1,), "
            f"got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    _check(query, key, value, window, softcap, dropout)
    visibility = packed(cu_seqlens_q, cu_seqlens_k, query.shape[2], key.shape[2], causal, window or 0)
    output, lse = _attend(query, key, value, visibility, seed, scaling, softcap, dropout, kernels)
    output = output[0].transpose(0, 1)
    return (output, lse[0]) if return_lse else output


def flash_attention_2(
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
    """``attn_implementation="flash_attention_2"``: see `attention`. Always Triton's kernels, never torch's.

    Raises AttentionError for attention weights, which it does not hold, for dense masks, and where Triton cannot run.
    """
    if output_attentions:
        raise AttentionError(
            "attention weights were asked for and 'flash_attention_2' does not hold them; "
            "load with attn_implementation='eager' or call model.set_attn_implementation('eager')"
        )
    if (reason := support.why_not(query.device)) is not None:
        raise AttentionError(
            f"attn_implementation='flash_attention_2' cannot run here: {reason}. "
            "Move the model to a GPU, or call model.set_attn_implementation('sdpa')"
        )
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, None, None, dropout)
    visibility = mask.memo.get("visibility")
    if visibility is None:
        visibility = mask.memo["visibility"] = of_mask(mask)
    return _attend(query, key, value, visibility, None, scaling, None, dropout, _TRITON)[0], None


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _check(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None, dropout: float
) -> None:
    if key.shape != value.shape or key.dim() != query.dim() or query.shape[-1] != key.shape[-1]:
        raise AttentionError(
            "query must be (batch, heads, query_length, head_dim) and key and value (batch, kv_heads, key_length, "
            f"head_dim), got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]:
        raise AttentionError(f"{query.shape[-3]} query heads cannot share {key.shape[-3]} key heads evenly")
    if not query.dtype == key.dtype == value.dtype:
        raise AttentionError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if window is not None and window < 1:
        raise AttentionError(f"window must be at least 1, the query's own key, got {window}")
    if softcap is not None and not softcap > 0:
        raise AttentionError(f"softcap must be positive, got {softcap}; None leaves scores as they are")
    if not 0 <= dropout < 1:
        raise AttentionError(f"dropout must be at least 0 and below 1, got {dropout}")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    seed: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout and seed is None:
        seed = philox.new_seed(query.device)
    seed = seed if dropout else None
    return dispatch(kernels, "flash_attention", query, key, value, visibility, seed, scale, softcap or 0.0, dropout)


def _torch_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(batch, kv_heads, -1, head_dim).to(wide)
    scores = (torch.matmul(grouped, key.to(wide).transpose(2, 3)) * scale).view(batch, heads, queries, keys)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = allowed(visibility, queries, keys, query.device)[:, None]
    nothing = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~(seen | nothing), float("-inf"))  # a row of -inf has no gradient
    lse = scores.logsumexp(-1, keepdim=True) if keys else scores.new_zeros((batch, heads, queries, 1))
    weights = torch.exp(scores - lse).masked_fill(nothing, 0.0)
    if seed is not None:
        weights = weights * philox.kept(seed, dropout, batch, heads, queries, keys) / (1 - dropout)
    output = torch.matmul(weights.view(batch, kv_heads, -1, keys), value.to(wide)).view(query.shape)
    lse = lse.masked_fill(nothing, float("-inf"))[..., 0]
    return output.to(query.dtype), lse.to(torch.float32)


declare("flash_attention", _torch_flash_attention, "flash")
