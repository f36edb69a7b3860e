"""Rotary position embedding."""

from __future__ import annotations

import torch
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
    half = query.shape[-1] // 2
    rotated_query = torch.addcmul(query * cos, query.roll(half, -1), sin)
    rotated_key = torch.addcmul(key * cos, key.roll(half, -1), sin)
    return rotated_query, rotated_key


declare("apply_rotary", _torch_apply_rotary, "rotary")
