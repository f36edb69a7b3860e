"""From what a caller passes (attention_mask, position_ids, cache) to one described mask for all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ArgumentError, AttentionError
from ..kernels import AttentionMask
from .key_view import KeyView


def build_mask(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    *,
    segments: Tensor | None = None,
    window: int | None = None,
    layer_idx: int = 0,
) -> AttentionMask:
    """Describe which keys the new tokens may see.

    hidden_states: (batch, seq, hidden_size), for sizes and device.
    attention_mask: None; (batch, past + seq), non-zero = keep; or a dense (batch or 1, heads or 1, seq, keys), bool or
        additive, taken as it is.
    position_ids: as the caller gave them, or None. Without mask and past, positions that do not rise by one start a
        new sequence: packed sequences do not see each other. (A static cache that only the device knows to be empty
        counts as past.)
    segments: (batch or 1, seq) number of each token's packed sequence, non-decreasing, if the caller told it.
    Raises ArgumentError for another rank, or for segments beside a dense mask or a past; AttentionError for sizes that
        do not fit.
    """
    query_length, device = hidden_states.shape[1], hidden_states.device
    view = cache.key_view(query_length, layer_idx) if cache is not None else KeyView(query_length)
    padding = dense = None
    alone = view.past == 0 and view.length == query_length
    if segments is not None and not (alone and (attention_mask is None or attention_mask.dim() == 2)):
        raise ArgumentError(
            "packed sequences (cu_seq_lens_q, seq_idx) go without a past, a static cache or a dense attention_mask"
        )
    if attention_mask is not None:
        if attention_mask.dim() == 4:
            dense = attention_mask
        elif attention_mask.dim() == 2:
            padding = _fit_padding(attention_mask.to(device).bool(), view, query_length)
        else:
            raise ArgumentError(
                "attention_mask must be (batch, past + seq) or (batch, heads, seq, keys), "
                f"got {tuple(attention_mask.shape)}"
            )
    elif segments is None and position_ids is not None and alone:
        segments = packed_segments(position_ids, hidden_states.shape[0])
    return AttentionMask(
        query_length=query_length,
        key_length=view.length,
        query_start=_to(view.query_start, device),
        window=window if view.newest is None else None,
        padding=padding,
        segments=segments,
        dense=dense,
        key_start=None if view.key_start is None else view.key_start.to(device),
        device=device,
    )


def _to(number: int | Tensor, device: torch.device) -> int | Tensor:
    return number.to(device) if isinstance(number, Tensor) else number  # a layer may live elsewhere than the inputs


def _fit_padding(keep: Tensor, view: KeyView, query_length: int) -> Tensor:
    """The (batch, key_length) part of a (batch, seen) mask that belongs to the keys attention will see."""
    given = keep.shape[1]
    if not view.room:
        return keep[:, view.first :] if view.first and given == view.first + view.length else keep
    fits = given <= view.room if view.past is None else given in (view.past + query_length, view.room)
    if not fits:
        seen = "at most " if view.past is None else f"{view.past + query_length} or "
        raise AttentionError(
            f"attention_mask covers {given} keys, the static cache takes {seen}{view.room}; pass one entry for each"
            " cached token and each new one, or one for each that there is room for"
        )
    if view.newest is not None or isinstance(view.first, Tensor):
        return keep[:, view.positions(keep.device).clamp(0, given - 1)]
    if given < view.length:
        return F.pad(keep, (0, view.length - given))  # places not yet written
    return keep[:, : view.length]


def packed_segments(position_ids: Tensor, batch: int) -> Tensor | None:
    """(batch, seq) number of the sequence each token belongs to, or None if every row holds one sequence."""
    steps = torch.diff(position_ids, dim=-1) != 1
    if not torch.compiler.is_compiling() and not bool(steps.any()):
        return None
    return F.pad(steps.cumsum(-1), (1, 0)).expand(batch, -1)
