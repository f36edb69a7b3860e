"""Rotary position embedding in Triton: queries and keys in one launch; differentiable once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from ..tuning import blocks
from .launch import launch
from .rows import by_position, lined_up, refused_dtype

_MOST_LINES = (1 << 31) - (1 << 16)  # (token, head) pairs are counted in 32 bits


@triton.jit
def _rotate_lines(
    X, Out, Cos, Sin, stride_b, stride_h, stride_s, cos_b, cos_s, sin_b, sin_s, block, lines, heads, length,
    HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    line = block * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    real = (line < lines) & (dims < HALF)
    token = line // heads
    head = line - token * heads
    batch = (token // length).to(tl.int64)
    place = (token % length).to(tl.int64)
    X += batch * stride_b + head.to(tl.int64) * stride_h + place * stride_s + dims
    Cos += batch * cos_b + place * cos_s + dims
    Sin += batch * sin_b + place * sin_s + dims
    Out += line.to(tl.int64) * (2 * HALF) + dims
    low = tl.load(X, mask=real, other=0.0).to(tl.float32)
    high = tl.load(X + HALF, mask=real, other=0.0).to(tl.float32)
    cos_low = tl.load(Cos, mask=real, other=0.0).to(tl.float32)
    cos_high = tl.load(Cos + HALF, mask=real, other=0.0).to(tl.float32)
    sin_low = tl.load(Sin, mask=real, other=0.0).to(tl.float32)
    sin_high = tl.load(Sin + HALF, mask=real, other=0.0).to(tl.float32)
    if BACKWARD:  # the transpose of [[cos_low, sin_low], [sin_high, cos_high]]
        from_high, from_low = sin_high, sin_low
    else:
        from_high, from_low = sin_low, sin_high
    tl.store(Out, (low * cos_low + high * from_high).to(Out.dtype.element_ty), mask=real)
    tl.store(Out + HALF, (high * cos_high + low * from_low).to(Out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["query_blocks", "query_lines", "key_lines", "length"])
def rotary(
    Q, K, OutQ, OutK, Cos, Sin, q_b, q_h, q_s, k_b, k_h, k_s, cos_b, cos_s, sin_b, sin_s,
    query_blocks, query_lines, key_lines, heads, kv_heads, length,
    HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_L lines, heads of tokens, of either the queries or the keys."""
    block = tl.program_id(0)
    if block < query_blocks:
        _rotate_lines(
            Q, OutQ, Cos, Sin, q_b, q_h, q_s, cos_b, cos_s, sin_b, sin_s, block, query_lines, heads, length,
            HALF, BACKWARD, BLOCK_L, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_lines(
            K, OutK, Cos, Sin, k_b, k_h, k_s, cos_b, cos_s, sin_b, sin_s, block - query_blocks, key_lines, kv_heads,
            length, HALF, BACKWARD, BLOCK_L, BLOCK_D,
        )  # fmt: skip


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The operation of that name, computed in fp32 and rounded once. The results are laid out (batch, seq, heads,
    head_dim) in memory."""
    return _forward(query, key, cos, sin)


def supports_apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why Triton's rotary embedding cannot take these, None if it can."""
    if query.dim() != 4 or key.dim() != 4 or key.shape[0] != query.shape[0] or key.shape[2:] != query.shape[2:]:
        return f"it takes (batch, heads, seq, head_dim), not {tuple(query.shape)} and {tuple(key.shape)}"
    batch, heads, length, head_dim = query.shape
    if head_dim % 2:
        return f"it takes an even head_dim, not {head_dim}"
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 4 or table.shape[0] not in (1, batch) or table.shape[1:] != (1, length, head_dim):
            return f"it takes a {name} of (1 or {batch}, 1, {length}, {head_dim}), not {tuple(table.shape)}"
        if table.requires_grad and torch.is_grad_enabled():
            return f"it has no gradient with respect to {name}"
    if batch * length * max(heads, key.shape[1]) > _MOST_LINES:
        return f"it takes up to {_MOST_LINES} heads of tokens, not {batch * length} tokens of {heads} heads"
    return refused_dtype(query, key, cos, sin)


def _rotated(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, dtypes: tuple[torch.dtype, torch.dtype], backward: bool
) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = query.shape
    kv_heads, half = key.shape[1], head_dim // 2
    rotated_query, rotated_key = by_position(query, dtypes[0]), by_position(key, dtypes[1])
    if half == 0:
        return rotated_query, rotated_key
    query, key, cos, sin = (lined_up(tensor) for tensor in (query, key, cos, sin))
    sizes = dict(blocks("rotary", "any", query.device))
    block_d = triton.next_power_of_2(half)
    block_l = max(1, sizes.pop("BLOCK") // block_d)
    query_lines, key_lines = batch * length * heads, batch * length * kv_heads
    query_blocks = triton.cdiv(query_lines, block_l)
    launch(
        rotary, (query_blocks + triton.cdiv(key_lines, block_l),),
        query, key, rotated_query, rotated_key, cos, sin, *query.stride()[:3], *key.stride()[:3],
        *_table_strides(cos), *_table_strides(sin), query_blocks, query_lines, key_lines, heads, kv_heads, length,
        HALF=half, BACKWARD=backward, BLOCK_L=block_l, BLOCK_D=block_d, **sizes,
    )  # fmt: skip
    return rotated_query, rotated_key


def _table_strides(table: Tensor) -> tuple[int, int]:
    return 0 if table.shape[0] == 1 else table.stride(0), table.stride(2)


def _promoted(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[torch.dtype, torch.dtype]:
    tables = torch.promote_types(cos.dtype, sin.dtype)
    return torch.promote_types(query.dtype, tables), torch.promote_types(key.dtype, tables)


def _triton_apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(query, key, cos, sin, _promoted(query, key, cos, sin), False)


def _fake_apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    query_dtype, key_dtype = _promoted(query, key, cos, sin)
    return by_position(query, query_dtype), by_position(key, key_dtype)


def _triton_backward(
    grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor, query_dtype: torch.dtype, key_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _rotated(grad_query, grad_key, cos, sin, (query_dtype, key_dtype), True)


def _fake_backward(
    grad_query: Tensor, grad_key: Tensor, cos: Tensor, sin: Tensor, query_dtype: torch.dtype, key_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return by_position(grad_query, query_dtype), by_position(grad_key, key_dtype)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, cos, sin = inputs
    ctx.save_for_backward(cos, sin)
    ctx.dtypes = (query.dtype, key.dtype)


@once_differentiable
def _gradients(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Any, ...]:
    return (*_backward(grad_query, grad_key, *ctx.saved_tensors, *ctx.dtypes), None, None)


_backward = define("apply_rotary_backward", _triton_backward, _fake_backward)
_forward = define("apply_rotary", _triton_apply_rotary, _fake_apply_rotary, backward=_gradients, setup_context=_save)
