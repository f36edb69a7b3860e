"""Scales of 4-bit blocks, themselves quantized, decoded in Triton: one launch instead of five."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..library import define
from ..scales import fake_scales
from ..tuning import blocks
from .launch import launch


@triton.jit
def decode_scales(Codes, Absmax, Code, Out, offset, count, blocksize, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    number = tl.load(Code + tl.load(Codes + place, mask=real, other=0).to(tl.int32))
    scale = tl.load(Absmax + place // blocksize, mask=real, other=0.0)
    tl.store(Out + place, number * scale + offset, mask=real)


def _decode(codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int) -> Tensor:
    out = fake_scales(codes, absmax, code, offset, blocksize)
    sizes = blocks("decode_4bit", "any", codes.device)
    launch(
        decode_scales, (triton.cdiv(out.numel(), sizes["BLOCK"]),),
        codes.contiguous(), absmax.contiguous(), code.contiguous(), out, offset, out.numel(), blocksize,
        **{**sizes, "enable_fp_fusion": False},
    )  # fmt: skip
    return out


_operation = define("triton_dequantize_absmax", _decode, fake_scales)


def dequantize_absmax(codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int) -> Tensor:
    """The operation of that name; the product and the sum are rounded apart, as bitsandbytes does."""
    return _operation(codes, absmax, code, offset, blocksize)


def supports_dequantize_absmax(
    codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int
) -> str | None:
    """Why Triton's decoder cannot take these, None if it can."""
    return None if codes.numel() < 1 << 31 else f"it takes fewer than 2^31 scales, not {codes.numel()}"
