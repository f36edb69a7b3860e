"""The head's projection and the next-token loss in one, where each rank of a group has some rows of the head's weight.

As in `linear_cross_entropy` the tokens are worked through in chunks and gradients are made in the forward pass; no rank
ever has the logits of the whole vocabulary. Between the ranks go three numbers for each token.
Source: Shoeybi et al. 2019, arXiv:1909.08053, section 3 (the loss over shares of the vocabulary).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear_cross_entropy import chunk_size
from .loss import average, check_targets, shifted_targets


def vocab_parallel_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    group: Any,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_cross_entropy` over the ranks of ``group``, alike on all of them.

    hidden_states: (batch, seq, hidden_size), the same on all ranks. weight: (vocab / ranks, hidden_size), this rank's
        rows, which follow those of the rank before. labels and the options: as for `causal_lm_loss`.
    Returns a scalar in fp32. The gradient of ``hidden_states`` is this rank's share of a sum, that of ``weight`` whole.
    Raises ValueError if shapes do not agree, IndexError on the CPU for a label outside the vocabulary; elsewhere such
    a label makes the loss NaN. Can be differentiated once.
    """
    targets = shifted_targets(hidden_states, "hidden_states", labels, shift_labels, ignore_index)
    check_targets(targets, weight.shape[0] * group.size(), ignore_index)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    kind = flat.device.type
    if torch.is_autocast_enabled(kind):
        flat = flat.to(torch.get_autocast_dtype(kind))
    total = _SharedLoss.apply(flat, weight, targets, ignore_index, group)
    return average(total, (targets != ignore_index).sum(), num_items_in_batch)


class _SharedLoss(torch.autograd.Function):
    """The summed loss of hidden states (tokens, hidden_size) against targets (tokens,)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, group: Any) -> Tensor:
        matrix = weight.to(states.dtype)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        for_states = torch.zeros_like(states) if wanted else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        size = chunk_size(states.shape[0], weight.shape[0], states)
        total = states.new_zeros((), dtype=torch.float32)
        for begin in range(0, states.shape[0], size):
            part = slice(begin, begin + size)
            losses, gradient = _rows(states[part] @ matrix.t(), targets[part], ignore_index, group)
            total += losses.sum()
            if for_states is not None and for_weight is not None:
                gradient = gradient.to(states.dtype)
                for_states[part] = gradient @ matrix
                for_weight += gradient.t() @ states[part]
        ctx.save_for_backward(for_states, for_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        for_states, for_weight = ctx.saved_tensors
        states = (for_states * grad).to(for_states.dtype) if ctx.needs_input_grad[0] else None
        weight = (for_weight * grad).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return states, weight, None, None, None


def _rows(logits: Tensor, targets: Tensor, ignore_index: int, group: Any) -> tuple[Tensor, Tensor]:
    """The loss of each row and the gradient of its sum by this rank's logits (tokens, vocab / ranks), both fp32."""
    logits = logits.float()
    largest = logits.amax(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits -= largest[:, None]
    counted = targets != ignore_index
    place = targets - group.rank() * logits.shape[1]
    here = (place >= 0) & (place < logits.shape[1]) & counted
    index = place.where(here, 0)[:, None]
    chosen = logits.gather(1, index)[:, 0].where(here, 0.0)
    gradient = logits.exp_()
    sums = torch.stack((gradient.sum(1), chosen, here.float()))
    dist.all_reduce(sums, group=group)
    found = sums[2].where(counted, 1.0)
    losses = (sums[0].log() - sums[1]).where(found > 0, torch.nan)  # a label that is nobody's
    gradient /= sums[0][:, None]
    gradient.scatter_add_(1, index, -here.float()[:, None])
    return losses.where(counted, 0.0), gradient.mul_(counted[:, None])
