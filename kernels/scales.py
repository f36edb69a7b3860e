"""Scales of 4-bit blocks that are quantized themselves: decoded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import KernelError
from . import native
from .dispatch import AUTO, Kernels, declare, declare_native, dispatch
from .library import define


class NestedScales(NamedTuple):
    """The quantization of scales themselves: scale = code[byte] * absmax[block of bytes] + offset.

    absmax: fp32, one for each ``blocksize`` scales. code: (256,) fp32. offset: the mean of the scales, an fp32 number.
    """

    absmax: Tensor
    code: Tensor
    offset: float
    blocksize: int = 256


def dequantize_absmax(
    codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int, *, kernels: Kernels = AUTO
) -> Tensor:
    """``code[byte] * scale of its block + offset`` in fp32, the product rounded before the sum (Dettmers et al. 2023,
    arXiv:2305.14314, section 3: double quantization).

    codes: (count,) uint8. absmax: (ceil(count / blocksize),) fp32. code: (256,) fp32. Returns (count,) fp32.
    Raises KernelError if these do not fit each other.
    """
    check_scales(codes, absmax, code, blocksize)
    return dispatch(kernels, "dequantize_absmax", codes, absmax, code, offset, blocksize)


def check_scales(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> None:
    """Raise KernelError unless quantized scales and what decodes them fit each other."""
    wanted = (
        ("codes", codes, (codes.numel(),), torch.uint8),
        ("absmax", absmax, (-(-codes.numel() // max(1, blocksize)),), torch.float32),
        ("code", code, (256,), torch.float32),
    )
    for name, tensor, shape, dtype in wanted:
        if tensor.shape != shape or tensor.dtype != dtype or blocksize < 1:
            raise KernelError(
                f"{name} of {codes.numel()} quantized scales in blocks of {blocksize} is {shape} {dtype}, not "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )


def _torch_form(codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int) -> Tensor:
    numbers = torch.index_select(code, 0, codes.int())
    whole = codes.numel() // blocksize
    numbers[: whole * blocksize].view(whole, blocksize).mul_(absmax[:whole, None])
    numbers[whole * blocksize :].mul_(absmax[whole:])
    return numbers.add_(offset)


def fake_scales(codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int) -> Tensor:
    """The result's shape and dtype, for compilers."""
    return codes.new_empty(codes.shape, dtype=torch.float32)


declare("dequantize_absmax", define("dequantize_absmax", _torch_form, fake_scales), "scales")
declare_native("dequantize_absmax", define("dequantize_absmax_native", native.dequantize_absmax, fake_scales))
