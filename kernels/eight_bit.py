"""int8 weights with a scale for each row, multiplied by inputs that are made int8 on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .dispatch import AUTO, Kernels, declare, dispatch
from .library import define

Multiply = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", torch.dtype], Tensor]
"""(int8 rows (m, k), int8 weight (n, k), their scales (m,) and (n,) fp32, bias or None, dtype): the scaled product."""

PER_127 = 7.874015718698502e-3  # 1 / 127 in fp32
PER_127_SQUARED = 6.200124e-05  # bitsandbytes' on a CPU, which lacks a zero: 1 / 127^2 is 6.2000124e-05
_CHUNK = {"cpu": 1 << 18, "gpu": 1 << 26}  # numbers decoded at a time, in fp32
_EXACT_COLUMNS = 1024  # 127 * 127 * 1024 < 2^24: a sum of so many products is exact in fp32


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scb: Tensor,
    bias: Tensor | None = None,
    threshold: float = 6.0,
    *,
    kernels: Kernels = AUTO,
) -> Tensor:
    """``x @ weight.T + bias`` by int8 products (LLM.int8(), arXiv:2208.07339); differentiable in x and bias.

    x: (..., in_features), fp32, fp16 or bf16, cast under autocast as in a linear layer; rounded to fp16, and each row
    made int8 by its largest magnitude. weight: (out_features, in_features) int8, scb: (out_features,) fp32; number =
    weight * scb / 127. threshold: columns of x with a magnitude at or above it are left out of that, and multiplied in
    the dtype of x; 0 for none. Result in the dtype of x, bit for bit that of bitsandbytes on a CPU in evaluation mode,
    with its int8 products, which are too large by 1.8e-5 of themselves.
    The gradient of x is that of the decoded weight, as if nothing had been rounded. A number that fp16 cannot hold is
    an outlier like any other; with threshold 0 it makes its row NaN. Raises KernelError if shapes do not fit.
    """
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1] and scb.shape == weight.shape[:1]
    if not fits or (bias is not None and bias.shape != scb.shape) or threshold < 0:
        raise KernelError(
            f"int8 rows of shape {tuple(weight.shape)} with scales {tuple(scb.shape)} cannot multiply x of shape "
            f"{tuple(x.shape)}{'' if bias is None else f', with a bias of {tuple(bias.shape)}'}, at a threshold of "
            f"{threshold}; x is (..., in_features), the threshold 0 or more"
        )
    if weight.dtype != torch.int8 or scb.dtype != torch.float32:
        raise KernelError(f"int8 rows are int8 with float32 scales, not {weight.dtype} with {scb.dtype}")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return dispatch(kernels, "linear_int8", x, weight, scb, bias, threshold)


def dequantize_rows(weight: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scb * (1 / 127) in fp32, rounded to ``dtype``. weight: (rows, columns) int8. scb: (rows,) fp32."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows = max(1, _CHUNK["cpu" if weight.device.type == "cpu" else "gpu"] // max(1, weight.shape[1]))
    for part, codes, scale in zip(out.split(rows), weight.split(rows), scb.split(rows), strict=True):
        part.copy_(codes.to(torch.float32).mul_(scale.unsqueeze(1)).mul_(PER_127))
    return out


def encode_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows as int8, largest magnitude of each in fp32): round(x * (127 / largest)), halves to even; zeros for zeros.

    rows: (m, k) fp16, with at least one column. Where the magnitude is infinite or NaN, the codes mean nothing.
    """
    # Without their sign, the bits of fp16 numbers are in the order of the numbers, and NaN is the largest.
    largest = (rows.view(torch.int16) & 0x7FFF).amax(1).view(torch.float16).float()
    factors = (127.0 / largest).masked_fill_(largest == 0, 0.0)
    return rows.float().mul_(factors.unsqueeze(1)).round_().to(torch.int8), largest


def forward(
    x: Tensor, weight: Tensor, scb: Tensor, bias: Tensor | None, threshold: float, multiply: Multiply
) -> Tensor:
    """The forward pass of `linear_int8` around a ``multiply`` that knows no outliers."""
    rows = x.reshape(-1, x.shape[-1])
    half, columns = rows.half(), None
    if threshold > 0:
        outliers = half.abs() >= threshold
        columns = outliers.any(0).nonzero().view(-1)
        if columns.numel():
            half = half.masked_fill(outliers, 0.0)  # a scale is that of the rest of its row
    encoded, scale = encode_rows(half)
    if columns is not None and columns.numel():
        encoded[:, columns] = 0
    out = multiply(encoded, weight, scale, scb, bias, x.dtype)
    if columns is not None and columns.numel():
        out = out.addmm(rows[:, columns], dequantize_rows(weight[:, columns], scb, x.dtype).t())
    return out.view(*x.shape[:-1], weight.shape[0])


def fake(x: Tensor, weight: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """The result's shape and dtype, for compilers."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what `backward` needs: the weight, which is there anyway."""
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.bias = None if inputs[3] is None else inputs[3].dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x and the bias, through the decoded weight."""
    weight, scb = ctx.saved_tensors
    of_x = grad @ _decode_operation(weight, scb, grad.dtype) if ctx.needs_input_grad[0] else None
    of_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias) if ctx.needs_input_grad[3] else None
    return of_x, None, None, of_bias, None


def _multiplies_int8(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a fast product of these; elsewhere it has a slow one or none."""
    if x.device.type == "cpu":  # of one column torch 2.13 makes a product that is not even always the same
        return torch.backends.cpu.get_cpu_capability() == "AVX512" and x.shape[1] > 1
    if x.device.type != "cuda" or torch.version.hip is not None:
        return False
    return x.shape[0] > 16 and x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, exact, int32."""
    if _multiplies_int8(x, weight):
        return torch._int_mm(x, weight.t())
    out = x.new_zeros((x.shape[0], weight.shape[0]), dtype=torch.int32)
    for part, columns in zip(x.split(_EXACT_COLUMNS, 1), weight.split(_EXACT_COLUMNS, 1), strict=True):
        out += (part.float() @ columns.float().t()).int()
    return out


def _torch_multiply(
    x: Tensor, weight: Tensor, scale: Tensor, scb: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = _product(x, weight) * (scale.unsqueeze(1) * scb) * PER_127_SQUARED
    return (out if bias is None else out + bias).to(dtype)


def _torch_linear(x: Tensor, weight: Tensor, scb: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    return forward(x, weight, scb, bias, threshold, _torch_multiply)


def _fake_decode(weight: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


_decode_operation = define("dequantize_rows", dequantize_rows, _fake_decode)
declare(
    "linear_int8",
    define("linear_int8", _torch_linear, fake, backward=backward, setup_context=keep_weight),
    "eight_bit",
)
