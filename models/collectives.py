"""What tensor-parallel ranks tell each other, forward and backward.

Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 (the pair of conjugate operators f and g).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Copy(torch.autograd.Function):
    """What every rank has, used by each for its own part: gradients are summed."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """The ranks' results summed: each gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any) -> Tensor:
        return _summed(states, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Gather(torch.autograd.Function):
    """The ranks' parts of the last dimension, side by side: each gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.width = group, states.shape[-1]
        states = states.contiguous()
        parts = [torch.empty_like(states) for _ in range(group.size())]
        dist.all_gather(parts, states, group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.group.rank() * ctx.width, ctx.width).contiguous(), None


def _summed(states: Tensor, group: Any) -> Tensor:
    total = states.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
