"""4-bit weights in blocks that share a scale: decoded, and multiplied with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import KernelError
from . import native
from .dispatch import AUTO, Kernels, declare, declare_native, dispatch
from .library import define
from .scales import NestedScales, check_scales, dequantize_absmax

# Numbers decoded at a time, in fp32: on a CPU they stay in its cache until they are multiplied.
_CHUNK = {"cpu": 1 << 18, "gpu": 1 << 26}
_ROWS_IN_FP32 = 4  # from which on a conversion of the weight is worth it


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    kernels: Kernels = AUTO,
) -> Tensor:
    """``code[nibble] * scale of its block``, in fp32, rounded to ``dtype``; of ``shape``.

    packed: (ceil(n / 2),) uint8, the first of two codes in the high bits. absmax: (ceil(n / blocksize),) fp32, one for
    each ``blocksize`` numbers, which is even, of the flattened tensor. code: (16,) fp32.
    Raises KernelError if these do not fit each other.
    """
    _check(packed, absmax, code, blocksize, shape)
    return dispatch(kernels, "dequantize_4bit", packed, absmax, code, blocksize, list(shape), dtype)


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    shape: Sequence[int],
    bias: Tensor | None = None,
    *,
    nested: NestedScales | None = None,
    kernels: Kernels = AUTO,
) -> Tensor:
    """``x @ weight.T + bias`` with a 4-bit weight, decoded to the dtype of ``x``; differentiable in x and bias.

    x: (..., in_features); under autocast it is cast as in a linear layer. packed, absmax, code, blocksize: as in
    `dequantize_4bit`. shape: (out_features, in_features). bias: (out_features,) or None, cast to the dtype of x.
    nested: of scales that are quantized themselves, ``absmax`` their bytes then.
    Returns (..., out_features) in that dtype. The weight is never held decoded as a whole in the forward pass on a CPU;
    the backward pass decodes it. The kernel "native" (CPUs with AVX2) multiplies few rows while it decodes, nested
    scales too, if it is also what runs for "dequantize_absmax"; else those are decoded first, to the same numbers.
    Raises KernelError if shapes do not fit each other.
    """
    _check(packed, absmax, code, blocksize, shape, scales=torch.float32 if nested is None else torch.uint8)
    if len(shape) != 2 or x.dim() == 0 or x.shape[-1] != shape[1] or (bias is not None and bias.shape != shape[:1]):
        raise KernelError(
            f"a 4-bit weight of shape {tuple(shape)} cannot multiply x of shape {tuple(x.shape)}"
            f"{'' if bias is None else f', with a bias of {tuple(bias.shape)}'}; it needs (..., in_features)"
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    given = (code, blocksize, list(shape), bias)
    if nested is None:
        return dispatch(kernels, "linear_4bit", x, packed, absmax, *given)
    if _decodes_scales(kernels, x, blocksize):
        check_scales(absmax, nested.absmax, nested.code, nested.blocksize)
        return dispatch(kernels, "linear_4bit", x, packed, absmax, *given, *nested)
    scales = dequantize_absmax(absmax, *nested, kernels=kernels)
    return dispatch(kernels, "linear_4bit", x, packed, scales, *given)


def _decodes_scales(kernels: Kernels, x: Tensor, blocksize: int) -> bool:
    """Whether the product that will run takes nested scales as they are, and is what was chosen for them."""
    if x.device.type != "cpu" or native.why_not_4bit(x.dtype, blocksize) is not None:
        return False
    return kernels.chosen("linear_4bit", x.device) == kernels.chosen("dequantize_absmax", x.device) == "native"


def _check(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int],
    scales: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    count = math.prod(shape)
    if blocksize <= 0 or blocksize % 2 or count <= 0:
        raise KernelError(f"4-bit blocks have an even number of numbers, not {blocksize}; the shape is {tuple(shape)}")
    wanted = (
        ("packed", packed, (count + 1) // 2, torch.uint8),
        ("absmax", absmax, -(-count // blocksize), scales),
        ("code", code, 16, torch.float32),
    )
    for name, tensor, size, dtype in wanted:
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise KernelError(
                f"{name} of a 4-bit tensor of shape {tuple(shape)} in blocks of {blocksize} is ({size},) {dtype}, not "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )


def _decode(pairs: Tensor, out: Tensor, packed: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Fill ``out``, flat, from its codes; ``pairs``: see `_pairs`."""
    count = out.numel()
    numbers = torch.index_select(pairs, 0, packed.int()).view(torch.float32)
    whole = count // blocksize * blocksize
    blocks = numbers[:whole].view(-1, blocksize)
    torch.mul(blocks, absmax[: blocks.shape[0]].unsqueeze(1), out=blocks)
    if whole < count:
        numbers[whole:].mul_(absmax[-1])
    out.copy_(numbers[:count])


def _pairs(code: Tensor) -> Tensor:
    """(256,): the two numbers of each byte, side by side in what is handled as one double."""
    return torch.stack((code.repeat_interleave(16), code.repeat(16)), 1).view(torch.float64).view(-1)


def _chunk(device: torch.device) -> int:
    return _CHUNK["cpu" if device.type == "cpu" else "gpu"]


def _torch_decode(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(list(shape), dtype=dtype, device=packed.device)
    flat, pairs = out.view(-1), _pairs(code)
    step = max(1, _chunk(packed.device) // blocksize) * blocksize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        codes, scales = packed[start // 2 :][: (part.numel() + 1) // 2], absmax[start // blocksize :]
        _decode(pairs, part, codes, scales[: -(-part.numel() // blocksize)], blocksize)
    return out


def _multiply(
    decode: Callable[[Tensor, Tensor, Tensor, int], None],
    x: Tensor, packed: Tensor, absmax: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The product, a few rows of the weight decoded at a time: ``decode(out, packed, absmax, blocksize)`` fills out."""
    rows, width = shape
    least = blocksize // math.gcd(blocksize, width)  # rows that end where a block does
    step = min(rows, max(1, _chunk(x.device) // (width * least)) * least)
    out = x.new_empty((*x.shape[:-1], rows))
    weight = x.new_empty(step * width)
    wide = x.numel() >= _ROWS_IN_FP32 * width and not _multiplies(x.device, x.dtype)
    inputs = x.float() if wide else x
    for start in range(0, rows, step):
        count = min(step, rows - start)
        first, numbers = start * width, count * width
        codes, scales = packed[first // 2 :][: (numbers + 1) // 2], absmax[first // blocksize :]
        decode(weight[:numbers], codes, scales[: -(-numbers // blocksize)], blocksize)
        part = None if bias is None else bias[start : start + count].to(inputs.dtype)
        product = F.linear(inputs, weight[:numbers].view(count, width).to(inputs.dtype), part)
        if count == rows:
            return product.to(x.dtype)
        out[..., start : start + count] = product
    return out


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices of that dtype are multiplied by instructions for it; else fp32 is some four times as fast."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type == "cpu" and dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def _torch_forward(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    return _multiply(partial(_decode, _pairs(code)), x, packed, absmax, blocksize, shape, bias)


def _native_decode(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(list(shape), dtype=dtype, device=packed.device)
    native.decode_4bit(code, out.view(-1), packed, absmax, blocksize)
    return out


def _native_forward(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None,
    nested_absmax: Tensor | None = None, nested_code: Tensor | None = None, nested_offset: float = 0.0,
    nested_blocksize: int = 1,
) -> Tensor:  # fmt: skip
    outputs, width = shape
    flat = x.reshape(-1, width)
    nested = (nested_absmax, nested_code, nested_offset, nested_blocksize)
    if not native.takes_rows(flat.shape[0], x.dtype, blocksize, width):
        scales = _scales(absmax, *nested)
        return _multiply(partial(native.decode_4bit, code), x, packed, scales, blocksize, shape, bias)
    y = native.linear_4bit(flat, packed, absmax, code, blocksize, outputs, *nested)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype).view(*x.shape[:-1], outputs)


def _scales(absmax: Tensor, nested_absmax: Tensor | None, code: Tensor | None, offset: float, blocksize: int) -> Tensor:
    if nested_absmax is None or code is None:
        return absmax
    return torch.ops.loadstone.dequantize_absmax_native(absmax, nested_absmax, code, offset, blocksize)


def _fake_native(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None,
    nested_absmax: Tensor | None = None, nested_code: Tensor | None = None, nested_offset: float = 0.0,
    nested_blocksize: int = 1,
) -> Tensor:  # fmt: skip
    return fake_linear(x, packed, absmax, code, blocksize, shape, bias)


def _keep_nested(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4], *inputs[7:9])
    ctx.blocksize, ctx.shape, ctx.nested = inputs[4], inputs[5], inputs[9:]


def _native_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, absmax, code, *nested = ctx.saved_tensors

    def weight() -> Tensor:
        scales = _scales(absmax, *nested, *ctx.nested)
        return _native_decoding(packed, scales, code, ctx.blocksize, ctx.shape, grad.dtype)

    return (*_gradients(ctx, grad, weight), *[None] * 4)


def fake_decode(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The result's shape and dtype, for compilers."""
    return packed.new_empty(list(shape), dtype=dtype)


def fake_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None
) -> Tensor:
    """The result's shape and dtype, for compilers."""
    return x.new_empty((*x.shape[:-1], shape[0]))


def keep_codes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what `linear_backward` needs: the packed weight, which is there anyway."""
    ctx.save_for_backward(*inputs[1:4])
    ctx.blocksize, ctx.shape = inputs[4], inputs[5]


def linear_backward(decode: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward pass of ``linear_4bit`` that decodes with ``decode``; itself differentiable in the gradient."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, lambda: decode(*ctx.saved_tensors, ctx.blocksize, ctx.shape, grad.dtype))

    return backward


def _gradients(ctx: Any, grad: Tensor, weight: Callable[[], Tensor]) -> tuple[Tensor | None, ...]:
    of_x = grad @ weight() if ctx.needs_input_grad[0] else None
    of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[6] else None
    return of_x, None, None, None, None, None, of_bias


def define_both(form: str, decode: Callable[..., Tensor], forward: Callable[..., Tensor]) -> tuple[Any, Any]:
    """The operations of decoding and of the product; ``form`` makes their names, as in "triton_{}"."""
    decoding = define(form.format("dequantize_4bit"), decode, fake_decode)
    backward = linear_backward(decoding)
    product = define(form.format("linear_4bit"), forward, fake_linear, backward=backward, setup_context=keep_codes)
    return decoding, product


_torch_operations = define_both("{}", _torch_decode, _torch_forward)
declare("dequantize_4bit", _torch_operations[0], "four_bit")
declare("linear_4bit", _torch_operations[1], "four_bit")
_native_decoding = define("dequantize_4bit_native", _native_decode, fake_decode)
_native_product = define(
    "linear_4bit_native", _native_forward, _fake_native, backward=_native_backward, setup_context=_keep_nested
)
declare_native("dequantize_4bit", _native_decoding, native.supports_dequantize_4bit)
declare_native("linear_4bit", _native_product, native.supports_linear_4bit)
