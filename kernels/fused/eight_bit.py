"""int8 products in Triton, scaled by the rows of both factors while they are in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eight_bit import PER_127_SQUARED, backward, fake, forward, keep_weight
from ..library import define
from ..tuning import blocks
from .launch import launch
from .rows import lined_up, refused_dtype

_FEW = 16  # rows of x for which there are block sizes of their own


@triton.jit
def multiply_int8(
    X, W, XScale, WScale, Bias, Out, stride_x, stride_w, rows, features, width, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs next to each other share columns of the output, so the same rows of the weight.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    X += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * stride_x
    W += tl.minimum(feature, features - 1).to(tl.int64)[None, :] * stride_w
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in tl.range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < width
        x = tl.load(X + column[None, :], mask=inside[None, :], other=0)
        w = tl.load(W + column[:, None], mask=inside[:, None], other=0)
        accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)
    x_scale = tl.load(XScale + row, mask=row < rows, other=0.0)
    w_scale = tl.load(WScale + feature, mask=feature < features, other=0.0)
    out = accumulator.to(tl.float32) * (x_scale[:, None] * w_scale[None, :]) * factor
    if Bias is not None:
        out += tl.load(Bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    target = row.to(tl.int64)[:, None] * features + feature[None, :]
    kept = (row < rows)[:, None] & (feature < features)[None, :]
    tl.store(Out + target, out.to(Out.dtype.element_ty), mask=kept)


def _multiply(x: Tensor, weight: Tensor, scale: Tensor, scb: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    (rows, width), features = x.shape, weight.shape[0]
    out = x.new_empty((rows, features), dtype=dtype)
    sizes = blocks("multiply_int8", "few" if rows <= _FEW else "many", x.device)
    x, weight = lined_up(x), lined_up(weight)
    launch(
        multiply_int8, (triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(features, sizes["BLOCK_N"])),
        x, weight, scale, scb.contiguous(), None if bias is None else bias.contiguous(), out,
        x.stride(0), weight.stride(0), rows, features, width, PER_127_SQUARED, **sizes,
    )  # fmt: skip
    return out


def _linear(x: Tensor, weight: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return forward(x, weight, scb, bias, threshold, _multiply)


_operation = define("triton_linear_int8", _linear, fake, backward=backward, setup_context=keep_weight)


def linear_int8(x: Tensor, weight: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """The operation of that name; deterministic."""
    return _operation(x, weight, scb, bias, threshold)


def supports_linear_int8(x: Tensor, weight: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> str | None:
    """Why Triton's product cannot take these, None if it can."""
    return refused_dtype(x, bias)
