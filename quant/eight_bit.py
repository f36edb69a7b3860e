"""LLM.int8(): a weight's rows as int8 with a scale each, and the linear layer that multiplies them by int8 inputs.

Source: Dettmers et al. 2022, arXiv:2208.07339, sections 2.1 (rows) and 3 (outlier columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QuantizationError
from ..kernels import AUTO, Kernels
from ..kernels import eight_bit as kernel

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 18  # numbers worked on at a time


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(weight as int8, (out_features, in_features); SCB, the largest magnitude of each row, (out_features,) fp32).

    weight: (out_features, in_features), fp32, fp16 or bf16. It is rounded to fp16 first, as bitsandbytes does, then
    each number is round(w * (127 / SCB)), halves to even; a row of zeros has SCB 0. Raises QuantizationError for
    another shape or dtype, and for numbers that fp16 cannot hold: beyond 65504, infinities, NaN.
    """
    if weight.dim() != 2 or weight.dtype not in _DTYPES or weight.numel() == 0:
        raise QuantizationError(
            "int8 rows hold matrices of float32, float16 or bfloat16 that are not empty, not a tensor of shape "
            f"{tuple(weight.shape)} and {weight.dtype}"
        )
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scb = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    for part, out, scale in zip(weight.split(rows), values.split(rows), scb.split(rows), strict=True):
        codes, largest = kernel.encode_rows(part.float().half())  # bf16 to fp16 directly is slow on a CPU
        out.copy_(codes)
        scale.copy_(largest)
    if not bool(scb.isfinite().all()):
        raise QuantizationError(
            f"a weight of shape {tuple(weight.shape)} holds numbers that float16, and so int8 rows, cannot: "
            "infinities, NaN or magnitudes beyond 65504; repair the checkpoint, or keep this module in full precision"
        )
    return values, scb


def dequantize_rows(weight: Tensor, scb: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 rows as numbers: weight * SCB * (1 / 127), in fp32, rounded to ``dtype``.

    weight: (out_features, in_features) int8. scb: (out_features,) fp32.
    """
    return kernel.dequantize_rows(weight, scb, dtype)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scb: Tensor,
    bias: Tensor | None = None,
    threshold: float = 6.0,
    *,
    kernels: Kernels = AUTO,
) -> Tensor:
    """``x @ weight.T + bias`` by int8 products; see `loadstone.kernels.eight_bit.linear_int8`."""
    return kernel.linear_int8(x, weight, scb, bias, threshold, kernels=kernels)
