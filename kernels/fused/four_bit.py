"""4-bit weights in Triton: decoded, and multiplied with a few rows without being decoded to memory.

For up to `MOST_ROWS` rows each program decodes its share of the weight in registers, once, and multiplies it by all
rows. The two codes of a byte are two products, of the even and of the odd columns of x, so that none is moved to
another thread. Where the rows of the weight are too few to occupy the GPU, its columns are split too, and the parts
added up in a fixed order. More rows: the weight is decoded to memory and multiplied by the vendor's library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..four_bit import define_both
from ..tuning import blocks
from .flash_forward import precision
from .launch import launch
from .rows import DTYPES, as_rows, processors, refused_dtype

MOST_ROWS = 16  # rows of x that one product takes
_MOST_SPLITS = 8


@triton.jit
def decode_4bit(Packed, Absmax, Code, Out, count, BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    byte = tl.load(Packed + place // 2, mask=real, other=0).to(tl.int32)
    number = tl.load(Code + ((byte >> ((1 - (place & 1)) * 4).to(tl.int32)) & 15))
    scale = tl.load(Absmax + place // BLOCKSIZE, mask=real, other=0.0)
    tl.store(Out + place, (number * scale).to(Out.dtype.element_ty), mask=real)


@triton.jit
def multiply_4bit(
    X, Packed, Absmax, Code, Bias, Out, stride_x, rows, width, features,
    BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # width: bytes of a row of the weight, whose numbers are twice as many. Out: (splits, rows, features). ALIGNED: the
    # BLOCK_K bytes of a row have one scale.
    HALF: tl.constexpr = BLOCKSIZE // 2
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(width, tl.num_programs(1)), BLOCK_K) * BLOCK_K
    begin = split * share
    end = tl.minimum(begin + share, width)
    row = tl.arange(0, BLOCK_M)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = feature < features
    start_of = tl.minimum(feature, features - 1).to(tl.int64) * width
    accumulator = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, end, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < end
        place = start_of[:, None] + column[None, :]
        byte = tl.load(Packed + place, mask=inside[None, :], other=0).to(tl.int32)
        if ALIGNED:
            scale = tl.load(Absmax + (start_of + start) // HALF)[:, None]
        else:
            scale = tl.load(Absmax + place // HALF, mask=inside[None, :], other=0.0)
        first = (tl.load(Code + (byte >> 4)) * scale).to(X.dtype.element_ty)
        second = (tl.load(Code + (byte & 15)) * scale).to(X.dtype.element_ty)
        where = X + row.to(tl.int64)[None, :] * stride_x + 2 * column[:, None]
        given = inside[:, None] & (row < rows)[None, :]
        even = tl.load(where, mask=given, other=0.0)
        odd = tl.load(where + 1, mask=given, other=0.0)
        accumulator = tl.dot(first, even, accumulator, input_precision=PRECISION)
        accumulator = tl.dot(second, odd, accumulator, input_precision=PRECISION)
    if Bias is not None:
        accumulator += tl.load(Bias + feature, mask=there, other=0.0).to(tl.float32)[:, None]
    target = (split.to(tl.int64) * rows + row[None, :]) * features + feature[:, None]
    kept = there[:, None] & (row < rows)[None, :]
    tl.store(Out + target, accumulator.to(Out.dtype.element_ty), mask=kept)


def _decode(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = packed.new_empty(list(shape), dtype=dtype)
    sizes = blocks("decode_4bit", "any", packed.device)
    launch(
        decode_4bit, (triton.cdiv(out.numel(), sizes["BLOCK"]),),
        packed.contiguous(), absmax.contiguous(), code.contiguous(), out, out.numel(), BLOCKSIZE=blocksize, **sizes,
    )  # fmt: skip
    return out


def _forward(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    if math.prod(x.shape[:-1]) > MOST_ROWS or shape[1] % 2:
        return F.linear(x, _decode(packed, absmax, code, blocksize, shape, x.dtype), bias)
    flat = as_rows(x)
    rows, (features, width) = flat.shape[0], shape
    sizes = blocks("multiply_4bit", "wide" if x.dtype == torch.float32 else "narrow", x.device)
    aligned = width % blocksize == 0
    if aligned:
        sizes = {**sizes, "BLOCK_K": min(sizes["BLOCK_K"], blocksize // 2)}
    programs = triton.cdiv(features, sizes["BLOCK_N"])
    splits = _splits(programs, triton.cdiv(width // 2, sizes["BLOCK_K"]), x.device)
    out = x.new_empty((splits, rows, features), dtype=x.dtype if splits == 1 else torch.float32)
    launch(
        multiply_4bit, (programs if rows else 0, splits),
        flat, packed.contiguous(), absmax.contiguous(), code.contiguous(),
        bias.contiguous() if bias is not None and splits == 1 else None, out,
        flat.stride(0), rows, width // 2, features,
        BLOCKSIZE=blocksize, ALIGNED=aligned, BLOCK_M=MOST_ROWS, PRECISION=precision(x.dtype), **sizes,
    )  # fmt: skip
    if splits == 1:
        return out.view(*x.shape[:-1], features)
    total = out.sum(0) if bias is None else out.sum(0).add_(bias)
    return total.to(x.dtype).view(*x.shape[:-1], features)


def _splits(programs: int, steps: int, device: torch.device) -> int:
    """How many programs share the columns: as many as two for each processor need, each with some work."""
    return max(1, min(triton.cdiv(2 * processors(device), programs), steps // 2, _MOST_SPLITS))


_decode_operation, _linear_operation = define_both("triton_{}", _decode, _forward)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The operation of that name."""
    return _decode_operation(packed, absmax, code, blocksize, shape, dtype)


def linear_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """The operation of that name; deterministic."""
    return _linear_operation(x, packed, absmax, code, blocksize, shape, bias)


def supports_dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> str | None:
    """Why Triton's decoder cannot take these, None if it can."""
    return None if dtype in DTYPES else f"it decodes to bfloat16, float16 and float32, not {dtype}"


def supports_linear_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None
) -> str | None:
    """Why Triton's product cannot take these, None if it can."""
    if blocksize < 32 or blocksize & (blocksize - 1):
        return f"it takes blocks of a power of two of at least 32 numbers, not {blocksize}"
    return refused_dtype(x, bias)
