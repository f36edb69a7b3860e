"""RMSNorm and LayerNorm in Triton, alone and behind the residual add; differentiable once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from ..tuning import Blocks, blocks
from .launch import launch
from .norm_kernels import norm_backward, norm_forward, norm_weights
from .rows import as_rows, processors, refused_dtype

_KEPT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_PROGRAMS_EACH = 2  # groups of rows for each processor, where a group gives a share of the weight's gradient


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The operation of that name."""
    return _norm(hidden_states, weight, None, eps, False, torch.promote_types(hidden_states.dtype, weight.dtype))[0]


def add_rms_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The operation of that name."""
    kept = torch.promote_types(hidden_states.dtype, residual.dtype)
    dtype = torch.promote_types(kept, weight.dtype)
    return _add_norm(hidden_states, residual, weight, None, eps, False, dtype)[:2]


def layer_norm(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The operation of that name; under CUDA's autocast the result is fp32, as torch's is."""
    dtype = torch.float32 if _autocasts(hidden_states) else hidden_states.dtype
    return _norm(hidden_states, weight, bias, eps, True, dtype)[0]


def add_layer_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The operation of that name; autocast as in `layer_norm`."""
    kept = torch.promote_types(hidden_states.dtype, residual.dtype)
    dtype = torch.float32 if _autocasts(hidden_states) else kept
    return _add_norm(hidden_states, residual, weight, bias, eps, True, dtype)[:2]


def supports_rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> str | None:
    """Why Triton's norm cannot take these, None if it can."""
    return _refused(hidden_states, None, weight, None)


def supports_add_rms_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor, eps: float) -> str | None:
    """Why Triton's norm cannot take these, None if it can."""
    return _refused(hidden_states, residual, weight, None)


def supports_layer_norm(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> str | None:
    """Why Triton's norm cannot take these, None if it can."""
    return _refused(hidden_states, None, weight, bias)


def supports_add_layer_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> str | None:
    """Why Triton's norm cannot take these, None if it can."""
    return _refused(hidden_states, residual, weight, bias)


def _refused(hidden_states: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> str | None:
    if residual is not None and residual.shape != hidden_states.shape:
        return f"it adds equal shapes, not {tuple(hidden_states.shape)} and {tuple(residual.shape)}"
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != hidden_states.shape[-1:]:
            return f"it takes a {name} of {tuple(hidden_states.shape[-1:])}, not {tuple(vector.shape)}"
    return refused_dtype(hidden_states, residual, weight, bias)


def _autocasts(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.is_autocast_enabled("cuda")


def _sizes(kernel: str, hidden_size: int, device: torch.device) -> Blocks:
    """Block sizes for a row; BLOCK_H is no wider than the row needs."""
    width = max(1, triton.next_power_of_2(hidden_size))
    found = blocks(kernel, f"h{max(512, width)}" if width <= 16384 else "long", device)
    return {**found, "BLOCK_H": min(width, found["BLOCK_H"])}


def _run_forward(
    hidden_states: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(normed, sum or None, mean: empty for RMSNorm, inverse deviation), the last two fp32, one a row."""
    out = hidden_states.new_empty(hidden_states.shape, dtype=dtype)
    kept, total = hidden_states.dtype, None
    if residual is not None:
        kept = torch.promote_types(kept, residual.dtype)
        total = hidden_states.new_empty(hidden_states.shape, dtype=kept)
    mean, rstd = _empty_statistics(hidden_states, center)
    x = as_rows(hidden_states)
    added = None if residual is None else as_rows(residual)
    rows, hidden_size = x.shape
    sizes = _sizes("norm_forward", hidden_size, x.device)
    launch(
        norm_forward, (triton.cdiv(rows, sizes["BLOCK_R"]),),
        x, added, weight.contiguous(), None if bias is None else bias.contiguous(), out, total, mean, rstd,
        x.stride(0), 0 if added is None else added.stride(0), rows, hidden_size, eps,
        KEPT=_KEPT[kept], CENTER=center, WHOLE=hidden_size <= sizes["BLOCK_H"], **sizes,
    )  # fmt: skip
    return out, total, mean, rstd


def _empty_statistics(hidden_states: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    shape = hidden_states.shape[:-1]
    mean = hidden_states.new_empty(shape if center else 0, dtype=torch.float32)
    return mean, hidden_states.new_empty(shape, dtype=torch.float32)


def _run_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, center: bool,
    weights: bool, biases: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the input, in its dtype, and of weight and bias in fp32, empty unless asked for."""
    out = total.new_empty(total.shape)
    gradient, x = as_rows(grad), as_rows(total)
    flowing = None if grad_total is None else as_rows(grad_total)
    rows, hidden_size = x.shape
    sizes = _sizes("norm_backward", hidden_size, x.device)
    whole = hidden_size <= sizes["BLOCK_H"]
    programs = triton.cdiv(rows, sizes["BLOCK_R"])
    shares = whole and (weights or biases)
    each = max(1, triton.cdiv(programs, _PROGRAMS_EACH * processors(x.device))) if shares else 1
    programs = triton.cdiv(programs, each)
    of_weight, of_bias = (_parts(x, programs, wanted and whole) for wanted in (weights, biases))
    launch(
        norm_backward, (programs,),
        gradient, flowing, x, weight.contiguous(), mean, rstd, out, of_weight, of_bias,
        gradient.stride(0), 0 if flowing is None else flowing.stride(0), x.stride(0), rows, hidden_size, each,
        CENTER=center, WHOLE=whole, **sizes,
    )  # fmt: skip
    if not whole and (weights or biases):
        of_weight, of_bias = _run_weights(gradient, x, mean, rstd, center, weights, biases)
    return out, _summed(of_weight, x), _summed(of_bias, x)


def _summed(parts: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32) if parts is None else parts.sum(0)


def _run_weights(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, center: bool, weights: bool, biases: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows, hidden_size = x.shape
    sizes = blocks("norm_weights", "long", x.device)
    across = triton.cdiv(hidden_size, sizes["BLOCK_H"])
    groups = triton.cdiv(rows, sizes["BLOCK_R"])
    wanted = max(1, triton.cdiv(4 * _PROGRAMS_EACH * processors(x.device), max(1, across)))
    each = max(1, triton.cdiv(groups, wanted))
    groups = triton.cdiv(groups, each)
    of_weight, of_bias = _parts(x, groups, weights), _parts(x, groups, biases)
    launch(
        norm_weights, (across, groups), grad, x, mean, rstd, of_weight, of_bias,
        grad.stride(0), x.stride(0), rows, hidden_size, each, CENTER=center, **sizes,
    )  # fmt: skip
    return of_weight, of_bias


def _parts(x: Tensor, groups: int, wanted: bool) -> Tensor | None:
    return x.new_empty((groups, x.shape[1]), dtype=torch.float32) if wanted else None


def _triton_norm(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out, _, mean, rstd = _run_forward(hidden_states, None, weight, bias, eps, center, dtype)
    return out, mean, rstd


def _fake_norm(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (hidden_states.new_empty(hidden_states.shape, dtype=dtype), *_empty_statistics(hidden_states, center))


def _triton_add_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, total, mean, rstd = _run_forward(hidden_states, residual, weight, bias, eps, center, dtype)
    assert total is not None
    return out, total, mean, rstd


def _fake_add_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kept = torch.promote_types(hidden_states.dtype, residual.dtype)
    out, total = (hidden_states.new_empty(hidden_states.shape, dtype=kind) for kind in (dtype, kept))
    return (out, total, *_empty_statistics(hidden_states, center))


def _fake_backward(
    grad: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, center: bool,
    weights: bool, biases: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    of_weight, of_bias = (
        total.new_empty(weight.shape if wanted else 0, dtype=torch.float32) for wanted in (weights, biases)
    )
    return total.new_empty(total.shape), of_weight, of_bias


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, weight, bias, _, center, _ = inputs
    _save(ctx, hidden_states, weight, bias, center, *output[1:])


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden_states, residual, weight, bias, _, center, _ = inputs
    ctx.dtypes = (hidden_states.dtype, residual.dtype)
    _save(ctx, output[1], weight, bias, center, *output[2:])


def _save(
    ctx: Any, total: Tensor, weight: Tensor, bias: Tensor | None, center: bool, mean: Tensor, rstd: Tensor
) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.center, ctx.bias_dtype = center, None if bias is None else bias.dtype


def _run_gradients(
    ctx: Any, grad: Tensor, grad_total: Tensor | None, weights: bool, biases: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total, weight, mean, rstd = ctx.saved_tensors
    of_input, of_weight, of_bias = _backward(grad, grad_total, total, weight, mean, rstd, ctx.center, weights, biases)
    return of_input, of_weight.to(weight.dtype) if weights else None, of_bias.to(ctx.bias_dtype) if biases else None


@once_differentiable
def _norm_gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    return (*_run_gradients(ctx, grad, None, *ctx.needs_input_grad[1:3]), None, None, None)


@once_differentiable
def _add_norm_gradients(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    of_weight = of_bias = None
    of_total = grad_total
    if grad is not None:
        of_total, of_weight, of_bias = _run_gradients(ctx, grad, grad_total, *ctx.needs_input_grad[2:4])
    of_both = [None if of_total is None else of_total.to(dtype) for dtype in ctx.dtypes]
    return (*of_both, of_weight, of_bias, None, None, None)


_backward = define("norm_backward", _run_backward, _fake_backward)
_norm = define("norm", _triton_norm, _fake_norm, backward=_norm_gradients, setup_context=_save_norm)
_add_norm = define(
    "add_norm", _triton_add_norm, _fake_add_norm, backward=_add_norm_gradients, setup_context=_save_add_norm
)
