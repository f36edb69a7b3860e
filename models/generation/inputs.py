"""The prompt: what the caller passes, checked, and what of it the model has not seen yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, GenerationError
from .options import logger


@dataclass
class Prompt:
    """ids: (rows, length), int64, possibly of length 0 beside embeds. embeds: (rows, seq, hidden_size) or None.
    mask: (rows, known), int64, None if nothing is padding. positions: (rows or 1, feed) or None for the plain ones.
    known: tokens attention knows once the prompt is fed; feed: how many of them the model has still to see.
    """

    ids: Tensor
    embeds: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    known: int
    feed: int

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.ids.device


def prompt_tensors(
    inputs: Any, input_ids: Any, inputs_embeds: Any, bos: int | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(input_ids (rows, length), inputs_embeds or None) from whichever was given; without any, one begin token.

    Raises ArgumentError, GenerationError for what cannot be a prompt.
    """
    if inputs is not None and input_ids is not None:
        raise ArgumentError("generate() got both inputs and input_ids, which are the same thing; pass one of them")
    ids = inputs if inputs is not None else input_ids
    if inputs_embeds is not None:
        if not isinstance(inputs_embeds, Tensor) or inputs_embeds.dim() != 3:
            raise ArgumentError("inputs_embeds must be a tensor (batch, seq, hidden_size)")
        inputs_embeds = inputs_embeds.to(device)
    if ids is None:
        rows = 1 if inputs_embeds is None else inputs_embeds.shape[0]
        if inputs_embeds is not None:
            return torch.empty((rows, 0), dtype=torch.long, device=device), inputs_embeds
        if bos is None:
            raise GenerationError("generate() needs input_ids, or a bos_token_id to begin with")
        return torch.full((rows, 1), bos, dtype=torch.long, device=device), None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        what = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ArgumentError(f"input_ids must be an integer tensor (batch, seq), got {what}")
    if inputs_embeds is not None and ids.shape[0] != inputs_embeds.shape[0]:
        raise ArgumentError(f"input_ids has {ids.shape[0]} rows and inputs_embeds {inputs_embeds.shape[0]}")
    if ids.shape[0] == 0 or (ids.shape[1] == 0 and inputs_embeds is None):
        raise GenerationError(f"the prompt is empty: input_ids has shape {tuple(ids.shape)}")
    return ids.to(device=device, dtype=torch.long), inputs_embeds


def prepare_prompt(
    ids: Tensor,
    embeds: Tensor | None,
    mask: Tensor | None,
    positions: Tensor | None,
    *,
    past: int,
    pad: int | None,
    eos: tuple[int, ...],
) -> Prompt:
    """Mask, positions and what is left to feed. ``past``: tokens that a given cache holds already."""
    rows, given = (ids if embeds is None else embeds).shape[:2]
    _warn_about_padding(ids if embeds is None else None, mask, pad, eos)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (given, past + given):
            raise GenerationError(
                f"attention_mask must be (batch, seq) = ({rows}, {past + given if past else given}),"
                f" got {tuple(mask.shape)}"
            )
        mask = mask.to(device=ids.device, dtype=torch.long)
        known = mask.shape[1]
    else:
        known = given
        if embeds is None and pad is not None and pad not in eos:
            mask = (ids != pad).long()
    feed = known - past
    if feed < 1:
        raise GenerationError(
            f"past_key_values holds {past} tokens and the prompt has {known}: nothing is left to feed. Pass the whole"
            " sequence, or only the new tokens with an attention_mask over the cached and the new ones"
        )
    if mask is not None and bool((mask == 1).all()):
        mask = None
    if positions is not None:
        positions = positions.to(ids.device).expand(rows, -1)[:, -feed:]
    elif mask is not None:
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -feed:]
    return Prompt(ids, embeds, mask, positions, known, feed)


def _warn_about_padding(ids: Tensor | None, mask: Tensor | None, pad: int | None, eos: tuple[int, ...]) -> None:
    if ids is None or pad is None or ids.shape[0] == 1:
        return
    if mask is None and pad in eos:
        logger.warning(
            "no attention_mask for a batch, and padding cannot be told from the end token (both are %d): if rows are"
            " padded, pass attention_mask",
            pad,
        )
    last = mask[:, -1] == 0 if mask is not None and mask.shape == ids.shape else ids[:, -1] == pad
    if bool(last.any()):
        logger.warning("the prompts are padded on the right; generation continues padding. Pad on the left instead")
