"""Next-token cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHUNK_NUMBERS = 1 << 22  # logits worked on at a time: 16 MB in fp32


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of each position's logits against the next position's label, in fp32.

    logits: (batch, seq, vocab), any float dtype. labels: (batch, seq), int64, shifted here; or ``shift_labels`` of the
        same shape, already shifted. Positions equal to ``ignore_index`` do not count.
    num_items_in_batch: divides the summed loss, so that gradient accumulation weighs tokens, not micro-batches;
        None takes the mean over the counted positions.
    Returns a scalar in fp32 (NaN if a mean has nothing to count). Works through the tokens in chunks: beyond the
    logits it holds one number per token, and in the backward pass the gradient. Can be differentiated once.
    Raises ValueError if the shapes do not agree, IndexError for a label outside the vocabulary.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("causal_lm_loss needs labels or shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(shift_labels.shape)}, logits {tuple(logits.shape)}: labels need one entry for "
            "each position with logits (logits_to_keep drops positions, so it cannot be combined with labels)"
        )
    targets = shift_labels.reshape(-1).to(logits.device)
    total = _CrossEntropySum.apply(logits.reshape(-1, logits.shape[-1]), targets, ignore_index)[0]
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _chunks(logits: Tensor) -> range:
    return range(0, logits.shape[0], max(1, _CHUNK_NUMBERS // max(1, logits.shape[1])))


class _CrossEntropySum(torch.autograd.Function):
    """Summed cross-entropy of logits (tokens, vocab) against targets (tokens,), and log-sum-exp (tokens, 1), fp32."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        counted = targets != ignore_index
        safe = torch.where(counted, targets, 0)
        chosen = logits.gather(1, safe[:, None]).float()
        log_probability = torch.empty_like(chosen)
        chunks = _chunks(logits)
        for start in chunks:
            part = slice(start, start + chunks.step)
            # the kernel of log_softmax is several times faster than that of logsumexp
            torch.gather(
                F.log_softmax(logits[part], -1, dtype=torch.float32), 1, safe[part, None], out=log_probability[part]
            )
        return torch.where(counted, -log_probability[:, 0], 0.0).sum(), chosen - log_probability

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.ignore_index = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        logits, targets, log_sum = ctx.saved_tensors
        counted = targets != ctx.ignore_index
        safe = torch.where(counted, targets, 0)[:, None]
        scale = torch.where(counted, grad, 0.0)[:, None]
        grad_logits = torch.empty_like(logits)
        chunks = _chunks(logits)
        for start in chunks:
            part = slice(start, start + chunks.step)
            if logits.dtype == torch.float32:
                share = torch.sub(logits[part], log_sum[part], out=grad_logits[part])
            else:
                share = logits[part].float().sub_(log_sum[part])
            share.exp_().mul_(scale[part])
            share.scatter_add_(1, safe[part], -scale[part])
            if logits.dtype != torch.float32:
                grad_logits[part] = share
        return grad_logits, None, None
