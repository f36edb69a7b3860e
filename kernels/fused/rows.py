"""What the norms, rotary and gate kernels share on the host: dtypes, and tensors as rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refused_dtype(*tensors: Tensor | None) -> str | None:
    """Why kernels that compute in fp32 cannot take the dtype of one of these, None if they can."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"it takes bfloat16, float16 and float32, not {str(tensor.dtype).removeprefix('torch.')}"
    return None


def lined_up(tensor: Tensor) -> Tensor:
    """The tensor with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_rows(tensor: Tensor) -> Tensor:
    """(..., size) as (rows, size), the last axis contiguous; a view where the strides allow one."""
    return lined_up(tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]))


def by_position(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of (batch, heads, seq, head_dim), laid out (batch, seq, heads, head_dim) in memory."""
    batch, heads, length, head_dim = tensor.shape
    return tensor.new_empty((batch, length, heads, head_dim), dtype=dtype).transpose(1, 2)


def processors(device: torch.device) -> int:
    """How many programs run at once on a GPU, at least: its multiprocessors. A small number elsewhere."""
    return _processors(device.type, device.index)


@lru_cache(maxsize=64)
def _processors(kind: str, index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if kind == "cuda" else 4
