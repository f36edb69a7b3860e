"""What the flash attention kernels share: intervals of visible keys, scores, and the random numbers of dropout."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_keys(
    Lower, Upper, rows, query_start, window, keys,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """First visible key and end of the visible keys, int32, for the queries ``rows``."""
    if BOUNDED:
        lower = tl.load(Lower + rows)
        upper = tl.load(Upper + rows)
    else:
        place = rows + query_start
        if WINDOWED:
            lower = tl.maximum(place - window + 1, 0)
        else:
            lower = rows * 0
        if CAUSAL:
            upper = tl.minimum(place + 1, keys)
        else:
            upper = rows * 0 + keys
    return lower, upper


@triton.jit
def key_runs(lower, upper, Hidden, KEEP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a block of queries begins to look, where it and all of its queries see every key, and where it ends.

    (begin, full_begin, full_end, end), whole blocks of BLOCK_N keys but for the end. Hidden: with KEEP, whether keys
    between others are hidden, so that no block is seen whole.
    """
    begin = tl.maximum(tl.min(lower, 0), 0) // BLOCK_N * BLOCK_N
    end = tl.max(upper, 0)
    full_begin = (tl.max(lower, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_end = tl.min(upper, 0) // BLOCK_N * BLOCK_N
    full_begin = tl.maximum(tl.minimum(full_begin, end), begin)
    if KEEP:
        full_end = tl.where(tl.load(Hidden) != 0, full_begin, full_end)
    return begin, full_begin, tl.maximum(full_end, full_begin), end


@triton.jit
def seeing_queries(
    First, End, columns, query_start, window, queries,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """First query that sees a key and end of those that do, int32, for the keys ``columns``."""
    if BOUNDED:
        first = tl.load(First + columns)
        end = tl.load(End + columns)
    else:
        if CAUSAL:
            first = tl.minimum(tl.maximum(columns - query_start, 0), queries)
        else:
            first = columns * 0
        if WINDOWED:
            end = tl.minimum(tl.maximum(columns + window - query_start, 0), queries)
        else:
            end = columns * 0 + queries
    return first, end


@triton.jit
def tanh(x):
    """tanh, right to a few units in the last place also near zero, where the quotient of exponentials is not."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    square = x * x
    near = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))))
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2, and the derivative of the cap; ``products`` are query · key."""
    if SOFTCAP:
        bent = tanh(products * (scale / softcap))
        return bent * (softcap * LOG2E), 1.0 - bent * bent
    else:
        return products * (scale * LOG2E), products


@triton.jit
def kept_by_dropout(Seed, columns, rows, row_of_batch, dropout):
    """Whether dropout keeps each weight; columns, rows: int32 of one shape. The numbers are those of `philox.kept`."""
    zero = columns * 0
    drawn, _, _, _ = tl.philox(tl.load(Seed), columns, rows, zero + row_of_batch, zero)
    return (drawn >> 8).to(tl.float32) * (1.0 / 16777216.0) >= dropout
