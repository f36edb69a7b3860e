"""Flash attention for a few queries over many keys (decoding): the keys are split over programs, then merged.

The query heads that share a key head, and the queries, are the rows of one product, so that each key is read once. Each
program takes its share of the keys that its rows see, and the partial results merge by their log-sum-exp.
Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import blocks
from ..visibility import Visibility
from .flash_forward import padded_dim, precision, shape_class, stride_over
from .flash_parts import LN2, capped, visible_keys
from .launch import launch
from .rows import processors

MOST_ROWS = 64
_LEAST_KEYS = 256  # a split shorter than this costs more to merge than it saves
_MOST_SPLITS = 128


@triton.jit(do_not_specialize=["query_start", "window"])
def _decode(
    Q, K, V, Out, Lse, Lower, Upper, Keep,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_os, stride_ls, stride_bounds, stride_keep, heads, queries, keys, query_start, window, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, KEEP: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK_R)
    real = rows < queries * GROUP
    query_of = tl.minimum(rows // GROUP, queries - 1)
    head_of = kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    fits = real[:, None]
    if D != BLOCK_D:
        fits = fits & (dims < D)[None, :]
    if BOUNDED:
        Lower += batch * stride_bounds
        Upper += batch * stride_bounds
    lower, upper = visible_keys(Lower, Upper, query_of, query_start, window, keys, CAUSAL, WINDOWED, BOUNDED)
    first = tl.maximum(tl.min(lower, 0), 0)
    behind = tl.max(upper, 0)
    share = (tl.maximum(behind - first, 0) + tl.num_programs(0) - 1) // tl.num_programs(0)
    share = (share + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    begin = first + split * share
    end = tl.minimum(begin + share, behind)

    where = batch * stride_qb + head_of * stride_qh + query_of.to(tl.int64) * stride_qm
    query = tl.load(Q + where[:, None] + dims[None, :], mask=fits, other=0.0)
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    if KEEP:
        Keep += batch * stride_keep
    accumulator = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        place = start + columns
        far = place.to(tl.int64)[:, None]
        inside = place < end
        there = inside[:, None]
        if D != BLOCK_D:
            there = there & (dims < D)[None, :]
        key = tl.load(K + far * stride_kn + dims[None, :], mask=there, other=0.0)
        value = tl.load(V + far * stride_vn + dims[None, :], mask=there, other=0.0)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores, _ = capped(products, scale, softcap, SOFTCAP)
        seen = inside[None, :] & (place[None, :] >= lower[:, None]) & (place[None, :] < upper[:, None])
        if KEEP:
            seen = seen & (tl.load(Keep + place, mask=inside, other=0) != 0)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, 1)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator * fade[:, None], input_precision=PRECISION)
        highest = now
    saw_nothing = total == 0.0
    total = tl.where(saw_nothing, 1.0, total)
    # (split, batch, head, query): what a split found, its weights summing to 1, and their log-sum-exp
    line = (batch * heads + head_of) * queries + query_of
    output = (accumulator / total[:, None]).to(Out.dtype.element_ty)
    tl.store(Out + split * stride_os + line[:, None] * D + dims[None, :], output, mask=fits)
    lse = tl.where(saw_nothing, float("-inf"), (highest + tl.log2(total)) * LN2)
    tl.store(Lse + split * stride_ls + line, lse, mask=real)


@triton.jit
def _merge(
    Parts, PartLse, Out, Lse, lines, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    real = parts < splits
    lse = tl.load(PartLse + parts.to(tl.int64) * lines + line, mask=real, other=float("-inf"))
    highest = tl.max(lse, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(lse - base)
    total = tl.sum(weights, 0)
    fits = real[:, None] & (dims < D)[None, :]
    where = (parts.to(tl.int64)[:, None] * lines + line) * D + dims[None, :]
    found = tl.load(Parts + where, mask=fits, other=0.0)
    divisor = tl.where(total == 0.0, 1.0, total)
    output = tl.sum(found * weights[:, None], 0) / divisor
    tl.store(Out + line * D + dims, output.to(Out.dtype.element_ty), mask=dims < D)
    tl.store(Lse + line, tl.where(total == 0.0, float("-inf"), base + tl.log(divisor)))


def split_count(batch: int, kv_heads: int, keys: int, device: torch.device) -> int:
    """How many programs share the keys of one head: two for each processor of the GPU, if there are keys for all."""
    wanted = triton.cdiv(2 * processors(device), max(1, batch * kv_heads))
    return max(1, min(wanted, triton.cdiv(keys, _LEAST_KEYS), _MOST_SPLITS))


def fits_decode(query: Tensor, key: Tensor) -> bool:
    """Whether the queries of a group of heads are few enough to be the rows of one product."""
    return query.shape[2] * (query.shape[1] // key.shape[1]) <= MOST_ROWS


def decode(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """As `flash_forward.forward`, without dropout; the output is laid out (batch, heads, query_length, head_dim).

    query_length times the heads of a group is at most `MOST_ROWS`. The same bits every time: the number of splits
    follows from shapes and the device.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    output = query.new_empty((batch, heads, queries, head_dim))
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    splits = split_count(batch, kv_heads, keys, query.device)
    parts, part_lse = (output, lse) if splits == 1 else (
        query.new_empty((splits, *output.shape), dtype=torch.float32), lse.new_empty((splits, *lse.shape)),
    )  # fmt: skip
    sizes = blocks("flash_decode", shape_class(head_dim, query.dtype), query.device)
    launch(
        _decode, (splits, kv_heads, batch),
        query, key, value, parts, part_lse, visibility.lower, visibility.upper, visibility.keep,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], output.numel(), lse.numel(),
        stride_over(visibility.lower), stride_over(visibility.keep), heads, queries, keys,
        visibility.query_start, visibility.window, scale, softcap,
        GROUP=group, D=head_dim, BLOCK_D=padded_dim(head_dim), BLOCK_R=max(16, triton.next_power_of_2(queries * group)),
        CAUSAL=visibility.causal, WINDOWED=visibility.window > 0, BOUNDED=visibility.lower is not None,
        KEEP=visibility.keep is not None, SOFTCAP=softcap > 0, PRECISION=precision(query.dtype), **sizes,
    )  # fmt: skip
    if splits > 1:
        launch(
            _merge, (lse.numel(),), parts, part_lse, output, lse, lse.numel(), splits,
            D=head_dim, BLOCK_D=padded_dim(head_dim), BLOCK_S=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return output, lse
