"""Which keys each query sees, as intervals.

Causality, windows, padding given as lengths and packed sequences have this in common: the keys a query sees lie side by
side, and both ends of that interval never move backwards from one query to the next. Two whole numbers a query describe
them all, and no mask of (query_length, key_length) is ever made. Padding with holes is the one thing beyond that: it
keeps a number for each key too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import AttentionError
from .mask import AttentionMask


@dataclass(frozen=True)
class Visibility:
    """The keys each query sees: ``lower <= key < upper``, and ``keep`` where given.

    lower, upper: (batch or 1, query_length), int32, non-decreasing along a row; None for what ``query_start``,
        ``causal`` and ``window`` say: query i sits at place ``i + query_start`` among the keys, sees itself and what
        comes before if ``causal``, and no further back than ``window`` keys, its own included (0: no window).
    keep: (batch, key_length), uint8, non-zero where a key may be seen; None if the intervals say all. Keys it hides
        at the ends of a row are outside ``lower`` and ``upper`` too.
    holes: (batch,), int32, non-zero where ``keep`` hides keys between others.
    """

    query_start: int = 0
    causal: bool = False
    window: int = 0
    lower: Tensor | None = None
    upper: Tensor | None = None
    keep: Tensor | None = None
    holes: Tensor | None = None


def of_mask(mask: AttentionMask) -> Visibility:
    """The intervals of a described mask; built on its device without waiting for it.

    Raises AttentionError for a dense mask, which may hide any key.
    """
    if mask.dense is not None:
        raise AttentionError(
            "flash attention takes causality, windows, padding and packed sequences, not a mask of "
            f"{tuple(mask.dense.shape)}; pass attention_mask as (batch, seq), or use attn_implementation='sdpa'"
        )
    start, end = mask.key_start, mask.key_end
    keep = holes = None
    if mask.padding is not None:
        first, last, holes = _ends(mask.padding)
        keep = mask.padding.to(torch.uint8).contiguous()
        start = first if start is None else torch.maximum(start, first)
        end = last if end is None else torch.minimum(end, last)
    window = mask.window if mask.window is not None and mask.window < mask.key_length else 0
    seen = intervals(
        mask.query_length,
        mask.key_length,
        query_start=mask.query_start,
        causal=mask.causal,
        window=window,
        key_start=start,
        key_end=end,
        segments=mask.segments,
        device=mask.device,
    )
    return seen if keep is None else replace(seen, keep=keep, holes=holes)


def intervals(
    query_length: int,
    key_length: int,
    *,
    query_start: int | Tensor = 0,
    causal: bool = False,
    window: int = 0,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    segments: Tensor | None = None,
    device: torch.device,
) -> Visibility:
    """Intervals of a batch, in the terms of `AttentionMask`.

    query_start: place of the first query among the keys. key_start, key_end: (batch or 1,): keys outside are hidden.
    segments: (batch or 1, key_length), non-decreasing; a query sees keys of the segment at its own place.
    """
    if isinstance(query_start, int) and key_start is None and key_end is None and segments is None:
        return Visibility(query_start, causal, window)
    place = torch.arange(query_length, device=device)[None] + query_start
    lower = (place - (window - 1)).clamp(min=0) if window else torch.zeros_like(place)
    upper = (place + 1).clamp(max=key_length) if causal else torch.full_like(place, key_length)
    if key_start is not None:
        lower = torch.maximum(lower, key_start.reshape(-1, 1))
    if key_end is not None:
        upper = torch.minimum(upper, key_end.reshape(-1, 1))
    if segments is not None:
        segments = segments.contiguous()
        own = segments.gather(1, place.clamp(0, key_length - 1).expand(segments.shape[0], -1)).contiguous()
        lower = torch.maximum(lower, torch.searchsorted(segments, own))
        upper = torch.minimum(upper, torch.searchsorted(segments, own, right=True))
    lower, upper = torch.broadcast_tensors(lower, upper)
    return Visibility(0, causal, window, _numbers(lower), _numbers(upper))


def packed(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, causal: bool, window: int
) -> Visibility:
    """Intervals of sequences laid one after the other.

    cu_seqlens_q, cu_seqlens_k: (sequences + 1,), integer, ends of the sequences, 0 first. queries, keys: tokens in all.
    The last query of a sequence sits at its last key (bottom-right alignment).
    """
    tokens = torch.arange(queries, device=cu_seqlens_q.device)
    starts_q, starts_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    row = (torch.searchsorted(starts_q, tokens, right=True) - 1).clamp(max=starts_q.shape[0] - 2)
    begin, end = starts_k[row], starts_k[row + 1]
    place = tokens - starts_q[row + 1] + end
    lower = torch.maximum(begin, place - (window - 1)) if window else begin
    upper = torch.maximum(begin, torch.minimum(end, place + 1)) if causal else end
    behind = tokens >= starts_q[-1]  # belongs to no sequence and sees nothing
    lower, upper = (torch.where(behind, starts_k[-1], bound) for bound in (lower, upper))
    return Visibility(0, causal, window, _numbers(lower[None]), _numbers(upper[None].clamp(max=keys)))


def by_key(visibility: Visibility, key_length: int) -> tuple[Tensor | None, Tensor | None]:
    """(first, end): (batch or 1, key_length), int32: the queries ``first <= query < end`` that see a key; None where
    ``lower`` and ``upper`` are."""
    lower, upper = visibility.lower, visibility.upper
    if lower is None or upper is None:
        return None, None
    keys = torch.arange(key_length, device=lower.device, dtype=torch.int32).expand(lower.shape[0], -1).contiguous()
    first = torch.searchsorted(upper, keys, right=True, out_int32=True)
    return first, torch.searchsorted(lower, keys, right=True, out_int32=True)


def allowed(visibility: Visibility, query_length: int, key_length: int, device: torch.device) -> Tensor:
    """(batch or 1, query_length, key_length), bool: the same, written out."""
    keys = torch.arange(key_length, device=device)
    if visibility.lower is not None and visibility.upper is not None:
        lower, upper = visibility.lower[..., None], visibility.upper[..., None]
    else:
        place = torch.arange(query_length, device=device)[None, :, None] + visibility.query_start
        lower = place - (visibility.window - 1) if visibility.window else torch.zeros_like(place)
        upper = place + 1 if visibility.causal else torch.full_like(place, key_length)
    seen = (keys >= lower) & (keys < upper)
    return seen if visibility.keep is None else seen & visibility.keep[:, None, :].bool()


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()


def _ends(keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First kept key, end behind the last one, and whether any between them is hidden; (batch,) each."""
    length = keep.shape[1]
    counted = keep.to(torch.int32)
    any_kept = counted.amax(1)
    first = counted.argmax(1)
    last = (length - counted.flip(1).argmax(1)) * any_kept
    return first, last, (counted.sum(1) != last - first).to(torch.int32) * any_kept
