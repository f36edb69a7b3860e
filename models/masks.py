"""From what a caller passes (attention_mask, position_ids, cache) to one described mask for all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ArgumentError
from ..kernels import AttentionMask


def build_mask(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    *,
    window: int | None = None,
    layer_idx: int = 0,
) -> AttentionMask:
    """Describe which keys the new tokens may see.

    hidden_states: (batch, seq, hidden_size), for sizes and device.
    attention_mask: None; (batch, past + seq), non-zero = keep; or a dense (batch or 1, heads or 1, seq, keys), bool or
        additive, taken as it is.
    position_ids: as the caller gave them, or None. Without mask and past, positions that do not rise by one start a
        new sequence: packed sequences do not see each other.
    Raises ArgumentError for another rank, AttentionError for sizes that do not fit.
    """
    query_length, device = hidden_states.shape[1], hidden_states.device
    past = cache.get_seq_length(layer_idx) if cache is not None else 0
    key_length, key_offset = cache.key_span(query_length, layer_idx) if cache is not None else (query_length, 0)
    padding = dense = segments = None
    if attention_mask is not None:
        if attention_mask.dim() == 4:
            dense = attention_mask
        elif attention_mask.dim() == 2:
            padding = _fit_padding(attention_mask.to(device), past + query_length, key_length, key_offset)
        else:
            raise ArgumentError(
                "attention_mask must be (batch, past + seq) or (batch, heads, seq, keys), "
                f"got {tuple(attention_mask.shape)}"
            )
    elif position_ids is not None and past == 0:
        segments = packed_segments(position_ids, hidden_states.shape[0])
        if segments is not None and key_length > query_length:
            segments = F.pad(segments, (0, key_length - query_length), value=-1)
    return AttentionMask(
        query_length=query_length,
        key_length=key_length,
        query_start=past - key_offset,
        window=window,
        padding=padding,
        segments=segments,
        dense=dense,
        device=device,
    )


def _fit_padding(attention_mask: Tensor, seen: int, key_length: int, key_offset: int) -> Tensor:
    """The (batch, key_length) part of the mask that belongs to the keys attention will see."""
    keep = attention_mask.bool()
    if keep.shape[1] == seen and key_length + key_offset > seen:
        keep = F.pad(keep, (0, key_length + key_offset - seen))  # places of a static cache not yet written
    if key_offset and keep.shape[1] == key_length + key_offset:
        keep = keep[:, key_offset:]
    return keep


def packed_segments(position_ids: Tensor, batch: int) -> Tensor | None:
    """(batch, seq) number of the sequence each token belongs to, or None if every row holds one sequence."""
    steps = torch.diff(position_ids, dim=-1) != 1
    if not torch.compiler.is_compiling() and not bool(steps.any()):
        return None
    return F.pad(steps.cumsum(-1), (1, 0)).expand(batch, -1)
