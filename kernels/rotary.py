"""Rotary position embedding."""

from __future__ import annotations

from torch import Tensor

from .dispatch import AUTO, Kernels, declare, dispatch


def apply_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, kernels: Kernels = AUTO
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by position (Su et al. 2021, arXiv:2104.09864, half-split form).

    query: (batch, heads, seq, head_dim); key: (batch, kv_heads, seq, head_dim), any float dtype.
    cos, sin: (batch or 1, 1, seq, head_dim) in the same dtype; the first half of ``sin`` is already negated, which
        turns the rotation of halves into a roll.
    Returns the pair in the dtype that the inputs promote to.
    """
    return dispatch(kernels, "apply_rotary", query, key, cos, sin)


def _torch_apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Both products are rounded before they are added, as transformers does: one fused rounding moves the last bits, and
    # 8-bit layers make steps of these.
    return (states * cos).add_(states.roll(states.shape[-1] // 2, -1) * sin)


declare("apply_rotary", _torch_apply_rotary, "rotary")
