"""Flash attention in torch's terms: two operations, one that autograd follows and one for decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from ..visibility import Visibility
from . import flash_backward, flash_decode, flash_forward
from .rows import by_position, lined_up, refused_dtype

_MOST_DIM = 256
_MOST_BLOCKS = 65535  # of the second and third axes of a grid


def supports_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> str | None:
    """Why Triton's flash attention cannot take these, None if it can."""
    if (reason := refused_dtype(query)) is not None:
        return reason
    if not 1 <= query.shape[3] <= _MOST_DIM:
        return f"it takes a head_dim of 1 to {_MOST_DIM}, not {query.shape[3]}"
    if max(query.shape[:2]) > _MOST_BLOCKS:
        return f"it takes a batch and heads of up to {_MOST_BLOCKS}, not {tuple(query.shape[:2])}"
    return None


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The operation of that name: output as ``query``, and the log-sum-exp (batch, heads, query_length) in fp32."""
    seen = (visibility.lower, visibility.upper, visibility.keep)
    place = (visibility.query_start, visibility.causal, visibility.window)
    recorded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not recorded and not dropout and flash_decode.fits_decode(query, key):
        return _decode(query, key, value, *seen, *place, scale, softcap)
    return _forward(query, key, value, *seen, visibility.holes, seed, *place, scale, softcap, dropout)


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, lower: Tensor | None, upper: Tensor | None, keep: Tensor | None,
    holes: Tensor | None, seed: Tensor | None, query_start: int, causal: bool, window: int, scale: float,
    softcap: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return flash_forward.forward(
        lined_up(query), lined_up(key), lined_up(value),
        Visibility(query_start, causal, window, lower, upper, keep, holes), seed, scale, softcap, dropout,
    )  # fmt: skip


def _fake_flash_attention(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return by_position(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _flash_attention_backward(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None,
    lower: Tensor | None, upper: Tensor | None, keep: Tensor | None, holes: Tensor | None, seed: Tensor | None,
    query_start: int, causal: bool, window: int, scale: float, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return flash_backward.backward(
        lined_up(query), lined_up(key), lined_up(value), lined_up(output), lse, lined_up(grad),
        None if grad_lse is None else grad_lse.contiguous(),
        Visibility(query_start, causal, window, lower, upper, keep, holes), seed, scale, softcap, dropout,
    )  # fmt: skip


def _fake_backward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return by_position(query), by_position(key), by_position(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:8])
    ctx.options = inputs[8:]


@once_differentiable
def _gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, output, lse, *described = ctx.saved_tensors
    nothing = (None,) * 11
    if grad is None and grad_lse is None:
        return (None, None, None, *nothing)
    if grad is None:
        grad = torch.zeros_like(output)
    return (*_backward(query, key, value, output, lse, grad, grad_lse, *described, *ctx.options), *nothing)


def _flash_attention_decode(
    query: Tensor, key: Tensor, value: Tensor, lower: Tensor | None, upper: Tensor | None, keep: Tensor | None,
    query_start: int, causal: bool, window: int, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return flash_decode.decode(
        lined_up(query), lined_up(key), lined_up(value),
        Visibility(query_start, causal, window, lower, upper, keep), scale, softcap,
    )  # fmt: skip


def _fake_decode(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


_backward = define("flash_attention_backward", _flash_attention_backward, _fake_backward)
_forward = define("flash_attention", _flash_attention, _fake_flash_attention, backward=_gradients, setup_context=_save)
_decode = define("flash_attention_decode", _flash_attention_decode, _fake_decode)
