"""Next-token cross-entropy."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
    Returns a scalar in fp32. Raises ValueError if the shapes do not agree.
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
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]), targets, ignore_index=ignore_index, reduction=reduction
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
