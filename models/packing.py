"""Packed sequences: several texts in one row, told apart by their ends or their numbers, as collators pass them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, nearest

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Keywords of a forward: (sequences + 1,) integer ends of the sequences, 0 first; the longest one's length, a hint that
nothing here needs; or (1, seq) the number of the sequence that each token belongs to."""


def given_segments(packing: Mapping[str, Any], batch: int, length: int, device: torch.device) -> Tensor | None:
    """(1, seq) non-decreasing number of each token's sequence, None if the keywords say nothing of it.

    Raises ArgumentError for an unknown keyword, several rows, or ends that are not those of one row.
    """
    for name in packing:
        if name not in PACKING:
            raise ArgumentError(f"the decoder got an unknown argument {name!r}{nearest(name, PACKING)}")
    ends, numbers = packing.get("cu_seq_lens_q"), packing.get("seq_idx")
    of_keys = packing.get("cu_seq_lens_k")
    if ends is None and of_keys is not None:
        raise ArgumentError("cu_seq_lens_k was given without cu_seq_lens_q; without a cache both are the same")
    if ends is None and numbers is None:
        return None
    if batch != 1:
        raise ArgumentError(f"cu_seq_lens_q and seq_idx describe sequences packed into one row, got {batch} rows")
    if ends is None:
        assert numbers is not None
        return _by_number(numbers.to(device), length)
    _check_ends(ends, ends if of_keys is None else of_keys, length)
    places = torch.arange(length, device=device)
    return torch.searchsorted(ends.to(device=device, dtype=places.dtype).contiguous(), places, right=True)[None]


def _check_ends(ends: Tensor, of_keys: Tensor, length: int) -> None:
    if ends.dim() != 1 or ends.shape[0] < 2 or ends.is_floating_point():
        raise ArgumentError(
            f"cu_seq_lens_q must be (sequences + 1,) whole numbers, got {tuple(ends.shape)} of {ends.dtype}"
        )
    if torch.compiler.is_compiling():  # which cannot look at values
        return
    values = ends.tolist()
    if values[0] != 0 or values[-1] != length or any(after < before for before, after in pairwise(values)):
        raise ArgumentError(
            f"cu_seq_lens_q must rise from 0 to the {length} tokens of the row, got {values[:4]} to {values[-1]}"
        )
    if of_keys is not ends and of_keys.tolist() != values:
        raise ArgumentError("cu_seq_lens_k differs from cu_seq_lens_q; queries and keys of one forward are the same")


def _by_number(numbers: Tensor, length: int) -> Tensor:
    if numbers.shape != (1, length):
        raise ArgumentError(f"seq_idx must be (1, {length}), one number for each token, got {tuple(numbers.shape)}")
    starts = torch.diff(numbers, dim=-1) != 0  # as numbers may come in any order
    return torch.nn.functional.pad(starts.cumsum(-1), (1, 0))


def positions_in(segments: Tensor) -> Tensor:
    """(1, seq) the place of each token in its own sequence."""
    segments = segments.contiguous()
    return torch.arange(segments.shape[1], device=segments.device)[None] - torch.searchsorted(segments, segments)
