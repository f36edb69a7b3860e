"""Next-token cross-entropy of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dispatch import AUTO, Kernels, declare, dispatch

_CHUNK_NUMBERS = 1 << 22  # logits worked on at a time: 16 MB in fp32


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    kernels: Kernels = AUTO,
) -> Tensor:
    """Cross-entropy of each position's logits against the next position's label, in fp32.

    logits: (batch, seq, vocab), any float dtype. labels: (batch, seq), int64, shifted here; or ``shift_labels`` of the
        same shape, already shifted. Positions equal to ``ignore_index`` do not count.
    num_items_in_batch: divides the summed loss, so that gradient accumulation weighs tokens, not micro-batches;
        None takes the mean over the counted positions.
    label_smoothing: share of the target spread evenly over the vocabulary, 0 to 1 (Szegedy et al. 2016,
        arXiv:1512.00567, section 7). softcap: logits become ``softcap * tanh(logits / softcap)`` first.
    Returns a scalar in fp32 (NaN if a mean has nothing to count). Works through the tokens in chunks: beyond the
    logits it holds one number per token, and in the backward pass the gradient. Can be differentiated once.
    Operation "cross_entropy": takes logits (tokens, vocab), targets (tokens,), ignore_index, label_smoothing, softcap;
    returns the sum of the losses, fp32, and the number of counted targets.
    Raises ValueError if the shapes do not agree or an option is out of its range, IndexError for a label outside the
    vocabulary; on a GPU, which nothing waits for, Triton makes the loss NaN instead, and torch's own assertion fails.
    """
    check_options(label_smoothing, softcap)
    targets = shifted_targets(logits, "logits", labels, shift_labels, ignore_index)
    flat = logits.reshape(-1, logits.shape[-1])
    total, counted = dispatch(kernels, "cross_entropy", flat, targets, ignore_index, label_smoothing, softcap)
    return average(total, counted, num_items_in_batch)


def check_options(label_smoothing: float, softcap: float | None) -> None:
    """Raise ValueError for a smoothing outside 0 to 1 or a cap that is not positive."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is a share, 0 to 1, got {label_smoothing!r}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap is a positive bound of the logits, or None, got {softcap!r}")


def shifted_targets(
    states: Tensor, name: str, labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int
) -> Tensor:
    """What each position is to predict: (tokens,), int64, on the device of ``states`` (..., width), called ``name``.

    Raises ValueError without labels, or if they do not have one entry for each position.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("the loss needs labels or shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if shift_labels.shape != states.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(shift_labels.shape)}, {name} {tuple(states.shape)}: labels need one entry for "
            f"each position with {name} (logits_to_keep drops positions, so it cannot be combined with labels)"
        )
    return shift_labels.reshape(-1).to(states.device, torch.int64)


def average(total: Tensor, counted: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The summed loss over what was counted, or over ``num_items_in_batch`` if given."""
    if num_items_in_batch is None:
        return total / counted
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise IndexError for a target outside the vocabulary, on the CPU; elsewhere that would wait for the device."""
    if targets.device.type != "cpu":
        return
    counted = targets[targets != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < vocabulary:
        raise IndexError(
            f"labels run from {int(counted.min())} to {int(counted.max())}, the vocabulary from 0 to {vocabulary - 1}; "
            f"positions that do not count have the label {ignore_index} (ignore_index)"
        )


def _torch_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    total = _CrossEntropySum.apply(logits, targets, ignore_index, label_smoothing, softcap)[0]
    return total, (targets != ignore_index).sum()


declare("cross_entropy", _torch_cross_entropy, "cross_entropy")


def _chunks(logits: Tensor) -> range:
    return range(0, logits.shape[0], max(1, _CHUNK_NUMBERS // max(1, logits.shape[1])))


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits.float() / softcap).mul_(softcap)


class _CrossEntropySum(torch.autograd.Function):
    """Summed cross-entropy of logits (tokens, vocab) against targets (tokens,), and log-sum-exp (tokens, 1), fp32."""

    @staticmethod
    def forward(
        logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        counted = targets != ignore_index
        safe = torch.where(counted, targets, 0)
        chosen = _capped(logits.gather(1, safe[:, None]), softcap).float()
        log_probability = torch.empty_like(chosen)
        even = torch.empty_like(chosen) if smoothing else log_probability
        chunks = _chunks(logits)
        for start in chunks:
            part = slice(start, start + chunks.step)
            # the kernel of log_softmax is several times faster than that of logsumexp
            share = F.log_softmax(_capped(logits[part], softcap), -1, dtype=torch.float32)
            log_probability[part] = share.gather(1, safe[part, None])
            if smoothing:
                even[part] = share.mean(1, keepdim=True)
        smoothed = torch.lerp(log_probability, even, smoothing) if smoothing else log_probability
        return torch.where(counted, -smoothed[:, 0], 0.0).sum(), chosen - log_probability

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[1], output[1])
        ctx.ignore_index, ctx.smoothing, ctx.softcap = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum = ctx.saved_tensors
        counted = targets != ctx.ignore_index
        safe = torch.where(counted, targets, 0)[:, None]
        scale = torch.where(counted, grad, 0.0)[:, None]
        grad_logits = torch.empty_like(logits)
        chunks = _chunks(logits)
        for start in chunks:
            part = slice(start, start + chunks.step)
            capped = _capped(logits[part], ctx.softcap)
            if logits.dtype == torch.float32:
                share = torch.sub(capped, log_sum[part], out=grad_logits[part])
            else:
                share = torch.sub(capped, log_sum[part]).float()
            share.exp_()
            if ctx.smoothing:
                share.sub_(ctx.smoothing / logits.shape[1])
            share.mul_(scale[part])
            share.scatter_add_(1, safe[part], scale[part] * (ctx.smoothing - 1.0))
            if ctx.softcap is not None:
                share.mul_(1.0 - (capped / ctx.softcap).square_())
            if logits.dtype != torch.float32:
                grad_logits[part] = share
        return grad_logits, None, None, None, None
