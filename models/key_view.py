"""What attention will see of one cache layer, told before it does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class KeyView:
    """The keys attention will see once the next tokens are in the layer, and where those tokens stand among them.

    length: number of keys. first: absolute position of the first; the others follow one by one.
    newest: () int64, given instead where the keys stand in a ring: the largest position, until the layer is updated.
        Position p is at place ``p % length``; which keys are there enforces the window, so the mask needs none.
    query_start, key_start: as in `AttentionMask`.
    past: tokens seen before these; None where only the device knows.
    room: tokens that a cache of fixed memory takes in all, 0 for one that grows.
    """

    length: int
    first: int | Tensor = 0
    newest: Tensor | None = None
    query_start: int | Tensor = 0
    key_start: Tensor | None = None
    past: int | None = 0
    room: int = 0

    def positions(self, device: torch.device) -> Tensor:
        """(length,) int64: the absolute position of each key; negative for places that nothing was written to."""
        places = torch.arange(self.length, device=device)
        if self.newest is not None:
            newest = self.newest.to(device)
            return newest - (newest - places) % self.length
        return places + (self.first.to(device) if isinstance(self.first, Tensor) else self.first)
