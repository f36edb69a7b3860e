"""Norms, rotary and gates by their formulas in float64, and how near to them a kernel has to be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loadstone.kernels import Kernels, add_rms_norm

TRITON, TORCH = Kernels("triton"), Kernels("torch")
LAYOUTS = ("contiguous", "offset", "every other", "wide rows", "transposed", "expanded")
Formula = Callable[..., "Tensor | tuple[Tensor, ...]"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def add_rms(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm(x + residual, weight, eps), x + residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    apart = x - x.mean(-1, keepdim=True)
    normed = apart / (apart.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return normed if bias is None else normed + bias


def add_layer(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return layer_norm(x + residual, weight, bias, eps), x + residual


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((high, low), -1) * sin

    return rotated(query), rotated(key)


def gate(name: str, gate: Tensor, up: Tensor) -> Tensor:
    if name in ("silu", "swish"):
        return gate / (1 + torch.exp(-gate)) * up
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def laid_out(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another memory layout ("expanded": the first row, again and again)."""
    if how == "offset":
        return torch.cat((tensor.new_zeros(3), tensor.flatten()))[3:].view(tensor.shape)
    if how == "every other":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if how == "wide rows":
        return torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]
    if how == "transposed" and tensor.dim() > 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "expanded" and tensor.dim() > 1:
        return tensor[:1].expand_as(tensor)
    return tensor.contiguous()


@lru_cache(maxsize=1)
def cuts_bf16() -> bool:
    """Whether float32 becomes bfloat16 by cutting bits off, as in Triton's interpreter, and not by rounding."""
    if torch.cuda.is_available():
        return False
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    return bool(add_rms_norm(one, one * 2**-8 * 1.5, one[0], 1e-5, kernels=TRITON)[1] == one)


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def incoming(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of outputs, always the same for the same shapes and dtypes."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]


def run(call: Callable[..., Any], arguments: Sequence[Any], grads: Sequence[Tensor] | None, wide: bool) -> list[Tensor]:
    """Outputs, and the gradients of the arguments that require one. wide: all of it in float64."""
    leaves = [
        (value.double() if wide and value.is_floating_point() else value).detach().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for value in arguments
    ]
    outputs = _as_tuple(call(*leaves))
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not wanted:
        return list(outputs)
    grads = [grad.to(output.dtype) for grad, output in zip(grads or incoming(outputs), outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, wanted, grads)]


def check(call: Callable[..., Any], formula: Formula, *arguments: Any) -> None:
    """The kernel is off the formula by at most twice what torch in the same dtype is, its gradients by three times.

    call: the public function, given the arguments and ``kernels=``. formula: the same in float64.
    """
    grads = incoming(_as_tuple(call(*arguments, kernels=TORCH)))
    outputs = len(grads)
    ours = run(lambda *values: call(*values, kernels=TRITON), arguments, grads, False)
    torchs = run(lambda *values: call(*values, kernels=TORCH), arguments, grads, False)
    exact = run(formula, arguments, grads, True)
    for place, (mine, its, right) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert mine.dtype == its.dtype
        assert mine.shape == its.shape
        if mine.numel() == 0:
            continue
        assert bool(mine.isfinite().all())
        room = (2 if place < outputs else 3) * (2 if cuts_bf16() and _has_bf16(arguments) else 1)
        floor = 2 * torch.finfo(mine.dtype).eps * float(right.abs().max())
        error, allowed = _off(mine, right), room * _off(its, right) + floor
        assert error <= allowed, f"result {place} is off by {error:.3g}, {allowed:.3g} are allowed"


def _has_bf16(arguments: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in arguments)


def _off(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max())


def same_bits(call: Callable[..., Any], *arguments: Any) -> None:
    """Two runs of the kernel, forward and backward, give the same bits."""
    first, second = (run(lambda *values: call(*values, kernels=TRITON), arguments, None, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
