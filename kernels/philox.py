"""The random numbers of dropout: counter-based, so that forward, backward and reference draw the same ones.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def new_seed(device: torch.device) -> Tensor:
    """(1,), int64, drawn from torch's generator of the device: ``torch.manual_seed`` and recomputation repeat it."""
    return torch.randint(0, 1 << 62, (1,), dtype=torch.int64, device=device)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, held in int64."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    return (high_half + (low_half >> 16)) >> 16, (low_half + (high_half << 16)) & _MASK


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """First word of Philox4x32-10 for the counter (c0, c1, c2, c3) and a 64-bit seed, in int64 holding 32 bits.

    seed: (1,), int64. The counter's words: int64 below 2^32, shapes that broadcast.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high_a, low_a = _product(_ROUND_A, c0)
        high_b, low_b = _product(_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0


def kept(seed: Tensor, probability: float, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """(batch, heads, queries, keys), bool: the weights that dropout of ``probability`` leaves.

    A weight's number depends on the seed, its key, its query and its row of (batch, heads) alone: no blocks, no order.
    """
    device = seed.device
    row = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    drawn = philox(seed, torch.arange(keys, device=device), torch.arange(queries, device=device)[:, None], row, row * 0)
    return (drawn >> 8).float() * 2.0**-24 >= probability
