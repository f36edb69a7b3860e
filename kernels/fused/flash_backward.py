"""Flash attention, backward: weights computed again from the log-sum-exp, gradients by two passes without atomics.

The first pass owns queries and gives their gradient, and on its way rowsum(output_grad * output) for the second, which
owns keys and adds up over the queries of all heads that share them, in one order: the same bits every time.
Source: Dao et al. 2022, arXiv:2205.14135, appendix B; Dao 2023, arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..tuning import blocks
from ..visibility import Visibility, by_key
from .flash_forward import padded_dim, precision, shape_class, stride_over
from .flash_parts import LOG2E, capped, kept_by_dropout, key_runs, seeing_queries, visible_keys
from .launch import launch
from .rows import by_position


@triton.jit
def _for_queries(
    grad_query, query, grad, lse, delta, K, V, Keep, Seed, stride_kn, stride_vn, begin, end, keys, rows, columns, dims,
    lower, upper, row_of_batch, scale, softcap, dropout,
    MASKED: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in tl.range(begin, end, BLOCK_N):
        place = start + columns
        far = place.to(tl.int64)[:, None]
        fits = (place < keys)[:, None]
        if D != BLOCK_D:
            fits = fits & (dims < D)[None, :]
        if MASKED or D != BLOCK_D:
            key = tl.load(K + far * stride_kn + dims[None, :], mask=fits, other=0.0)
            value = tl.load(V + far * stride_vn + dims[None, :], mask=fits, other=0.0)
        else:
            key = tl.load(K + far * stride_kn + dims[None, :])
            value = tl.load(V + far * stride_vn + dims[None, :])
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        scores, slope = capped(products, scale, softcap, SOFTCAP)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = (place[None, :] >= lower[:, None]) & (place[None, :] < upper[:, None])
            if KEEP:
                seen = seen & (tl.load(Keep + place, mask=place < keys, other=0) != 0)[None, :]
            weights = tl.where(seen, weights, 0.0)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        if DROPOUT:
            wide = tl.zeros_like(products).to(tl.int32)
            keep = kept_by_dropout(Seed, wide + place[None, :], wide + rows[:, None], row_of_batch, dropout)
            grad_weights = tl.where(keep, grad_weights / (1.0 - dropout), 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        if SOFTCAP:
            grad_scores = grad_scores * slope
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit(do_not_specialize=["query_start", "window"])
def _backward_queries(
    Q, K, V, Out, Grad, Lse, GradLse, GradQ, Delta, Lower, Upper, Keep, Holes, Seed,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, stride_dqb, stride_dqh, stride_dqm,
    stride_bounds, stride_keep, stride_holes, heads, queries, keys, query_start, window, scale, softcap, dropout,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    real = rows < queries
    far = rows.to(tl.int64)[:, None]
    fits = real[:, None]
    if D != BLOCK_D:
        fits = fits & (dims < D)[None, :]
    Q += batch * stride_qb + head * stride_qh
    K += batch * stride_kb + (head // GROUP) * stride_kh
    V += batch * stride_vb + (head // GROUP) * stride_vh
    Out += batch * stride_ob + head * stride_oh
    Grad += batch * stride_gb + head * stride_gh
    GradQ += batch * stride_dqb + head * stride_dqh
    line = (batch * heads + head) * queries
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

    query = tl.load(Q + far * stride_qm + dims[None, :], mask=fits, other=0.0)
    grad = tl.load(Grad + far * stride_gm + dims[None, :], mask=fits, other=0.0)
    output = tl.load(Out + far * stride_om + dims[None, :], mask=fits, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    if GRAD_LSE:
        delta = delta - tl.load(GradLse + line + rows, mask=real, other=0.0)
    tl.store(Delta + line + rows, delta, mask=real)
    lse = tl.load(Lse + line + rows, mask=real, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E  # a query that saw nothing has no weights
    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_of_batch = (batch * heads + head).to(tl.int32)
    if WINDOWED or BOUNDED or KEEP:
        grad_query = _for_queries(
            grad_query, query, grad, lse, delta, K, V, Keep, Seed, stride_kn, stride_vn, begin, full_begin, keys, rows,
            columns, dims, lower, upper, row_of_batch, scale, softcap, dropout,
            True, KEEP, D, BLOCK_D, BLOCK_N, SOFTCAP, DROPOUT, PRECISION,
        )  # fmt: skip
    grad_query = _for_queries(
        grad_query, query, grad, lse, delta, K, V, Keep, Seed, stride_kn, stride_vn, full_begin, full_end, keys, rows,
        columns, dims, lower, upper, row_of_batch, scale, softcap, dropout,
        False, KEEP, D, BLOCK_D, BLOCK_N, SOFTCAP, DROPOUT, PRECISION,
    )  # fmt: skip
    grad_query = _for_queries(
        grad_query, query, grad, lse, delta, K, V, Keep, Seed, stride_kn, stride_vn, full_end, end, keys, rows,
        columns, dims, lower, upper, row_of_batch, scale, softcap, dropout,
        True, KEEP, D, BLOCK_D, BLOCK_N, SOFTCAP, DROPOUT, PRECISION,
    )  # fmt: skip
    grad_query = (grad_query * scale).to(GradQ.dtype.element_ty)
    tl.store(GradQ + far * stride_dqm + dims[None, :], grad_query, mask=fits)


@triton.jit(do_not_specialize=["query_start", "window"])
def _backward_keys(
    Q, K, V, Grad, Lse, Delta, GradK, GradV, First, Last, Keep, Seed,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_bounds, stride_keep, heads, queries, keys, query_start, window, scale, softcap, dropout,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BOUNDED: tl.constexpr, KEEP: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    far = columns.to(tl.int64)[:, None]
    fits = (columns < keys)[:, None]
    if D != BLOCK_D:
        fits = fits & (dims < D)[None, :]
    key = tl.load(K + batch * stride_kb + kv_head * stride_kh + far * stride_kn + dims[None, :], mask=fits, other=0.0)
    value = tl.load(V + batch * stride_vb + kv_head * stride_vh + far * stride_vn + dims[None, :], mask=fits, other=0.0)
    if BOUNDED:
        First += batch * stride_bounds
        Last += batch * stride_bounds
    first, last = seeing_queries(
        First, Last, tl.minimum(columns, keys - 1), query_start, window, queries, CAUSAL, WINDOWED, BOUNDED
    )
    if KEEP:  # a hidden key is one that no query sees
        visible = tl.load(Keep + batch * stride_keep + columns, mask=columns < keys, other=0) != 0
        last = tl.where(visible, last, first)
    begin = tl.min(first, 0) // BLOCK_M * BLOCK_M
    count = (tl.maximum(tl.max(last, 0) - begin, 0) + BLOCK_M - 1) // BLOCK_M

    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    Q += batch * stride_qb + kv_head * GROUP * stride_qh
    Grad += batch * stride_gb + kv_head * GROUP * stride_gh
    # One loop over the query blocks of all heads that share the key: queries that do not exist add nothing.
    for step in tl.range(0, GROUP * count):
        member = step // count
        place = begin + (step - member * count) * BLOCK_M + rows
        there = place.to(tl.int64)[:, None]
        real = place < queries
        loaded = real[:, None]
        if D != BLOCK_D:
            loaded = loaded & (dims < D)[None, :]
        line = (batch * heads + kv_head * GROUP + member) * queries
        query = tl.load(Q + member * stride_qh + there * stride_qm + dims[None, :], mask=loaded, other=0.0)
        grad = tl.load(Grad + member * stride_gh + there * stride_gm + dims[None, :], mask=loaded, other=0.0)
        lse = tl.load(Lse + line + place, mask=real, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E
        delta = tl.load(Delta + line + place, mask=real, other=0.0)
        # Everything transposed, keys along the rows: the products below then take it as it comes.
        products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        scores, slope = capped(products, scale, softcap, SOFTCAP)
        weights = tl.exp2(scores - lse[None, :])
        if CAUSAL or WINDOWED or BOUNDED or KEEP:
            seen = (place[None, :] >= first[:, None]) & (place[None, :] < last[:, None])
            weights = tl.where(seen, weights, 0.0)
        grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        given = weights
        if DROPOUT:
            wide = tl.zeros_like(products).to(tl.int32)
            row_of_batch = (batch * heads + kv_head * GROUP + member).to(tl.int32)
            keep = kept_by_dropout(Seed, wide + columns[:, None], wide + place[None, :], row_of_batch, dropout)
            given = tl.where(keep, weights / (1.0 - dropout), 0.0)
            grad_weights = tl.where(keep, grad_weights / (1.0 - dropout), 0.0)
        grad_value = tl.dot(given.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :])
        if SOFTCAP:
            grad_scores = grad_scores * slope
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    GradK += batch * stride_dkb + kv_head * stride_dkh
    GradV += batch * stride_dvb + kv_head * stride_dvh
    grad_key = (grad_key * scale).to(GradK.dtype.element_ty)
    tl.store(GradK + far * stride_dkn + dims[None, :], grad_key, mask=fits)
    tl.store(GradV + far * stride_dvn + dims[None, :], grad_value.to(GradV.dtype.element_ty), mask=fits)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    visibility: Visibility,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes and dtypes, laid out (batch, seq, heads, head_dim) in memory.

    output, lse: what `forward` returned. grad: as output, the last axis contiguous. grad_lse: as lse, or None.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    grad_query = by_position(query)
    grad_key = by_position(key)
    grad_value = by_position(value)
    delta = lse.new_empty(lse.shape)
    shape = shape_class(head_dim, query.dtype)
    sizes = blocks("flash_backward_queries", shape, query.device)
    shared = {
        "GROUP": heads // kv_heads, "D": head_dim, "BLOCK_D": padded_dim(head_dim), "CAUSAL": visibility.causal,
        "WINDOWED": visibility.window > 0, "BOUNDED": visibility.lower is not None,
        "KEEP": visibility.keep is not None, "SOFTCAP": softcap > 0, "DROPOUT": dropout > 0,
        "PRECISION": precision(query.dtype),
    }  # fmt: skip
    rest = (heads, queries, keys, visibility.query_start, visibility.window, scale, softcap, dropout)
    launch(
        _backward_queries, (triton.cdiv(queries, sizes["BLOCK_M"]), heads, batch),
        query, key, value, output, grad, lse, grad_lse, grad_query, delta,
        visibility.lower, visibility.upper, visibility.keep, visibility.holes, seed,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], *grad.stride()[:3],
        *grad_query.stride()[:3], stride_over(visibility.lower), stride_over(visibility.keep),
        stride_over(visibility.holes), *rest, GRAD_LSE=grad_lse is not None, **shared, **sizes,
    )  # fmt: skip
    first, last = by_key(visibility, keys)
    sizes = blocks("flash_backward_keys", shape, query.device)
    launch(
        _backward_keys, (triton.cdiv(keys, sizes["BLOCK_N"]), kv_heads, batch),
        query, key, value, grad, lse, delta, grad_key, grad_value, first, last, visibility.keep, seed,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3],
        *grad_key.stride()[:3], *grad_value.stride()[:3], stride_over(first), stride_over(visibility.keep), *rest,
        **shared, **sizes,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
