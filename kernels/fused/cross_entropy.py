"""Cross-entropy of rows of logits: one pass for the log-sum-exp, kept as a running maximum and sum, and one for the
gradient, which may be written over the logits. A program owns a row; nothing is summed across programs.
Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (online softmax).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from ..linear_cross_entropy import summed_loss
from ..loss import check_targets
from ..tuning import blocks
from .flash_parts import LOG2E, tanh
from .launch import launch


@triton.jit
def _values(place, inside, softcap, SOFTCAP: tl.constexpr):
    """Logits in fp32, capped, -inf outside; and what was bent to cap them, in -1 to 1."""
    values = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
    if SOFTCAP:
        bent = tanh(values / softcap)
        return tl.where(inside, bent * softcap, float("-inf")), bent
    else:
        return values, values


@triton.jit(do_not_specialize=["ignore_index"])
def _row(
    Logits, Grad, Targets, Losses, Statistics, Scale,
    stride_logits, stride_grad, vocabulary, ignore_index, smoothing, softcap,
    LOSS: tl.constexpr, GRADIENT: tl.constexpr, SMOOTHED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LOSS: the row's loss and its Statistics (maximum, log of the sum of exponentials beyond it), else these are read.
    GRADIENT: times Scale's one number unless LOSS is computed too."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(Targets + row)
    counted = target != ignore_index
    known = (target >= 0) & (target < vocabulary)
    Logits += row * stride_logits
    columns = tl.arange(0, BLOCK)
    end = tl.where(counted, vocabulary, 0)
    if LOSS:
        # Read before anything is written: the gradient may take the logits' place.
        chosen, _ = _values(Logits + tl.where(known, target, 0), known, softcap, SOFTCAP)
        chosen = tl.where(known, chosen, 0.0)
        highest = float("-inf")
        total = 0.0
        plain = 0.0
        for start in tl.range(0, end, BLOCK):
            inside = start + columns < vocabulary
            values, bent = _values(Logits + start + columns, inside, softcap, SOFTCAP)
            now = tl.maximum(highest, tl.max(values, 0))
            base = tl.where(now == float("-inf"), 0.0, now)  # -inf - -inf is no number
            total = total * tl.exp2((highest - base) * LOG2E) + tl.sum(tl.exp2((values - base) * LOG2E), 0)
            if SMOOTHED:
                plain += tl.sum(tl.where(inside, values, 0.0), 0)
            highest = now
        highest = tl.where(counted, highest, 0.0)
        log_total = tl.log(tl.where(counted, total, 1.0))
        loss = log_total + (highest - chosen)
        if SMOOTHED:
            loss += smoothing * (chosen - plain / vocabulary)
        tl.store(Losses + row, tl.where(counted, tl.where(known, loss, float("nan")), 0.0))
        tl.store(Statistics + 2 * row, highest)
        tl.store(Statistics + 2 * row + 1, log_total)
    else:
        highest = tl.load(Statistics + 2 * row)
        log_total = tl.load(Statistics + 2 * row + 1)
    if GRADIENT:
        Grad += row * stride_grad
        scale = tl.where(known, 1.0, float("nan"))
        if not LOSS:
            scale = scale * tl.load(Scale)
        for start in tl.range(0, vocabulary, BLOCK):
            place = start + columns
            inside = place < vocabulary
            values, bent = _values(Logits + place, place < end, softcap, SOFTCAP)
            share = tl.exp2((values - highest - log_total) * LOG2E)
            if SMOOTHED:
                share -= smoothing / vocabulary
                share -= tl.where(place == target, 1.0 - smoothing, 0.0)
            else:
                share -= tl.where(place == target, 1.0, 0.0)
            if SOFTCAP:
                share *= 1.0 - bent * bent
            share = tl.where(counted, share * scale, 0.0)
            tl.store(Grad + place, share.to(Grad.dtype.element_ty), mask=inside)


def _launch(
    logits: Tensor,
    grad: Tensor,
    targets: Tensor,
    losses: Tensor,
    statistics: Tensor,
    scale: Tensor,
    options: tuple[int, float, float],
    **modes: bool,
) -> None:
    ignore_index, smoothing, softcap = options
    launch(
        _row, (logits.shape[0],), logits, grad, targets, losses, statistics, scale, logits.stride(0), grad.stride(0),
        logits.shape[1], ignore_index, smoothing, softcap or 1.0, **modes, SMOOTHED=smoothing != 0.0,
        SOFTCAP=softcap != 0.0, **blocks("cross_entropy", "row", logits.device),
    )  # fmt: skip


def rows(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    losses: Tensor,
    differentiate: bool,
) -> None:
    """A `linear_cross_entropy.Rows`: losses of a chunk, and gradients over its logits, in one launch."""
    statistics = losses.new_empty(*losses.shape, 2)
    options = (ignore_index, label_smoothing, softcap)
    _launch(logits, logits, targets, losses, statistics, losses, options, LOSS=True, GRADIENT=differentiate)


def _no_kernel_for(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes fp16, bf16 and fp32, not {tensor.dtype}"
    return None


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The operation "linear_cross_entropy" with this module's `rows`."""
    return summed_loss(hidden_states, weight, targets, ignore_index, label_smoothing, softcap, "triton")


def supports_linear_cross_entropy(hidden_states: Tensor, weight: Tensor, *_: Any) -> str | None:
    """Why not, or None."""
    return _no_kernel_for(hidden_states, weight)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The operation "cross_entropy"; holds two numbers per token until the backward pass."""
    total, counted, _ = _CROSS_ENTROPY(logits, targets, ignore_index, float(label_smoothing), float(softcap or 0.0))
    return total, counted


def supports_cross_entropy(logits: Tensor, *_: Any) -> str | None:
    """Why not, or None."""
    return _no_kernel_for(logits)


def _dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, number of counted targets, statistics (tokens, 2) in fp32."""
    check_targets(targets, logits.shape[1], ignore_index)
    logits = _dense_rows(logits)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    statistics = logits.new_empty(logits.shape[0], 2, dtype=torch.float32)
    options = (ignore_index, label_smoothing, softcap)
    _launch(logits, logits, targets, losses, statistics, losses, options, LOSS=True, GRADIENT=False)
    return losses.sum(), (targets != ignore_index).sum(), statistics


def _fake_forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = logits.new_empty((), dtype=torch.float32)
    return total, targets.new_empty((), dtype=torch.int64), total.new_empty(logits.shape[0], 2)


def _gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    """Gradient of the logits, times ``grad``, one number in fp32."""
    logits = _dense_rows(logits)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    options = (ignore_index, label_smoothing, softcap)
    _launch(logits, out, targets, statistics, statistics, grad, options, LOSS=False, GRADIENT=True)
    return out


def _fake_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[2])
    ctx.options = inputs[2:]


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return _GRADIENT(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_GRADIENT = define("cross_entropy_backward", _gradient, _fake_gradient)
_CROSS_ENTROPY = define("cross_entropy", _forward, _fake_forward, backward=_backward, setup_context=_setup_context)
