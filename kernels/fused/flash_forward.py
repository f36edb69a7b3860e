"""Flash attention, forward: one pass over the keys, the softmax kept as a running maximum and sum.

A program owns a block of queries of one head. Its keys are those of the union of its queries' intervals, in three runs:
up to where every query sees every key, the run in which all do, where no mask is computed, and the rest.
Source: Dao 2023, arXiv:2307.08691, algorithm 1; Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import blocks
from ..visibility import Visibility
from .flash_parts import LN2, capped, kept_by_dropout, key_runs, visible_keys
from .launch import launch
from .rows import by_position


@triton.jit
def _attend(
    accumulator, total, highest, query, K, V, Keep, Seed, stride_kn, stride_vn, begin, end, keys, rows, columns, dims,
    lower, upper, row_of_batch, scale, softcap, dropout,
    MASKED: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys ``begin <= key < end`` in, blocks of BLOCK_N at a time."""
    for start in tl.range(begin, end, BLOCK_N):
        place = start + columns
        far = place.to(tl.int64)[:, None]
        inside = (place < keys)[:, None]
        if D == BLOCK_D:
            fits = inside
        else:
            fits = inside & (dims < D)[None, :]
        if MASKED or D != BLOCK_D:
            key = tl.load(K + far * stride_kn + dims[None, :], mask=fits, other=0.0)
        else:
            key = tl.load(K + far * stride_kn + dims[None, :])
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores, _ = capped(products, scale, softcap, SOFTCAP)
        if MASKED:
            seen = (place[None, :] >= lower[:, None]) & (place[None, :] < upper[:, None])
            if KEEP:
                seen = seen & (tl.load(Keep + place, mask=place < keys, other=0) != 0)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf as its maximum, and -inf - -inf is no number.
        base = tl.where(now == float("-inf"), 0.0, now) if MASKED else now
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weights, 1)
        if DROPOUT:
            wide = tl.zeros_like(products).to(tl.int32)
            keep = kept_by_dropout(Seed, wide + place[None, :], wide + rows[:, None], row_of_batch, dropout)
            weights = tl.where(keep, weights, 0.0)
        accumulator = accumulator * fade[:, None]
        if MASKED or D != BLOCK_D:
            value = tl.load(V + far * stride_vn + dims[None, :], mask=fits, other=0.0)
        else:
            value = tl.load(V + far * stride_vn + dims[None, :])
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision=PRECISION)
        highest = now
    return accumulator, total, highest


@triton.jit(do_not_specialize=["query_start", "window"])
def _forward(
    Q, K, V, Out, Lse, Lower, Upper, Keep, Holes, Seed,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_bounds, stride_keep, stride_holes,
    heads, queries, keys, query_start, window, scale, softcap, dropout,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if CAUSAL:  # the longest first, so that the last to finish are short
        block = tl.num_programs(0) - 1 - block
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    fits = (rows < queries)[:, None]
    if D != BLOCK_D:
        fits = fits & (dims < D)[None, :]
    Q += batch * stride_qb + head * stride_qh
    K += batch * stride_kb + (head // GROUP) * stride_kh
    V += batch * stride_vb + (head // GROUP) * stride_vh
    if KEEP:
        Keep += batch * stride_keep
        Holes += batch * stride_holes
    if BOUNDED:
        Lower += batch * stride_bounds
        Upper += batch * stride_bounds
    lower, upper = visible_keys(
        Lower, Upper, tl.minimum(rows, queries - 1), query_start, window, keys, CAUSAL, WINDOWED, BOUNDED
    )
    begin, full_begin, full_end, end = key_runs(lower, upper, Holes, KEEP, BLOCK_N)

    query = tl.load(Q + rows.to(tl.int64)[:, None] * stride_qm + dims[None, :], mask=fits, other=0.0)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_of_batch = (batch * heads + head).to(tl.int32)
    if WINDOWED or BOUNDED or KEEP:
        accumulator, total, highest = _attend(
            accumulator, total, highest, query, K, V, Keep, Seed, stride_kn, stride_vn, begin, full_begin, keys, rows,
            columns, dims, lower, upper, row_of_batch, scale, softcap, dropout,
            True, KEEP, D, BLOCK_D, BLOCK_N, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
    accumulator, total, highest = _attend(
        accumulator, total, highest, query, K, V, Keep, Seed, stride_kn, stride_vn, full_begin, full_end, keys, rows,
        columns, dims, lower, upper, row_of_batch, scale, softcap, dropout,
        False, KEEP, D, BLOCK_D, BLOCK_N, SOFTCAP, DROPOUT, PRECISION,
    )  # fmt: skip
    accumulator, total, highest = _attend(
        accumulator, total, highest, query, K, V, Keep, Seed, stride_kn, stride_vn, full_end, end, keys, rows,
        columns, dims, lower, upper, row_of_batch, scale, softcap, dropout,
        True, KEEP, D, BLOCK_D, BLOCK_N, SOFTCAP, DROPOUT, PRECISION,
    )  # fmt: skip
    saw_nothing = total == 0.0
    total = tl.where(saw_nothing, 1.0, total)
    divisor = total * (1.0 - dropout) if DROPOUT else total
    Out += batch * stride_ob + head * stride_oh
    output = accumulator / divisor[:, None]
    tl.store(Out + rows.to(tl.int64)[:, None] * stride_om + dims[None, :], output.to(Out.dtype.element_ty), mask=fits)
    lse = tl.where(saw_nothing, float("-inf"), (highest + tl.log2(total)) * LN2)
    tl.store(Lse + (batch * heads + head) * queries + rows, lse, mask=rows < queries)


def padded_dim(head_dim: int) -> int:
    """The power of two, 16 or more, that holds ``head_dim``."""
    return max(16, triton.next_power_of_2(head_dim))


def shape_class(head_dim: int, dtype: torch.dtype) -> str:
    """The row of the block table: padded head_dim, and 16 or 32 bit numbers."""
    return f"d{padded_dim(head_dim)}-{8 * dtype.itemsize}"


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: exactly, unless torch's own switch for matmuls allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def stride_over(tensor: Tensor | None) -> int:
    """Numbers from one row of the batch to the next; 0 where there is one row for all, or no tensor."""
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """query: (batch, heads, query_length, head_dim); key, value: (batch, kv_heads, key_length, head_dim); the last axis
    contiguous. Returns the output in the query's dtype, laid out (batch, query_length, heads, head_dim) in memory, and
    the log-sum-exp (batch, heads, query_length) in fp32: -inf for a query that sees nothing, whose output is 0.
    """
    batch, heads, queries, head_dim = query.shape
    output = by_position(query)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    sizes = blocks("flash_forward", shape_class(head_dim, query.dtype), query.device)
    launch(
        _forward, (triton.cdiv(queries, sizes["BLOCK_M"]), heads, batch),
        query, key, value, output, lse, visibility.lower, visibility.upper, visibility.keep, visibility.holes, seed,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        stride_over(visibility.lower), stride_over(visibility.keep), stride_over(visibility.holes),
        heads, queries, key.shape[2], visibility.query_start, visibility.window, scale, softcap, dropout,
        GROUP=heads // key.shape[1], D=head_dim, BLOCK_D=padded_dim(head_dim), CAUSAL=visibility.causal,
        WINDOWED=visibility.window > 0, BOUNDED=visibility.lower is not None, KEEP=visibility.keep is not None,
        SOFTCAP=softcap > 0, DROPOUT=dropout > 0, PRECISION=precision(query.dtype), **sizes,
    )  # fmt: skip
    return output, lse
