"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), as Llama checkpoints were trained.

    hidden_states: (..., hidden_size), any float dtype; statistics in fp32. The normalised value is rounded to the
    input dtype before ``weight`` (hidden_size,) multiplies it.
    """
    dtype = hidden_states.dtype
    normed = hidden_states.float()
    scale = torch.rsqrt(normed.square().mean(-1, keepdim=True).add_(eps))
    return weight * (normed * scale).to(dtype)
