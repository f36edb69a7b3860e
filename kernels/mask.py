"""Which keys each query may see, described rather than materialised.

One description serves all layers of a forward pass. A backend that understands causality, windows or lengths reads
the fields; one that does not asks for `allowed` or `bias`, built on first use and then shared by all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionError


@dataclass(eq=False)
class AttentionMask:
    """Description of the visible keys.

    query_length, key_length: sizes of the two axes.
    query_start: place of the first query's own key on the key axis (0 without a cache); () int64 on ``device`` where
        the host does not know it, which no property waits for.
    causal: a query sees its own key and those before it; ``window`` limits that to the last ``window`` keys, its own
        included (``q - window < k <= q``).
    padding: (batch, key_length), bool, True where a key may be seen.
    segments: (batch, key_length), integer, non-decreasing along a row (packed sequences lie one after the other); a
        query sees keys of its own segment only.
    key_start, key_end: (batch or 1,), int64; keys before ``key_start``, and from ``key_end`` on, are hidden. Padding on
        either side, told by lengths.
    dense: (batch or 1, heads or 1, query_length, key_length), bool (True = visible) or an additive float bias; when
        given it is the whole truth and everything above is ignored.
    memo: where attention implementations keep what they make of the mask, once for all layers.
    """

    query_length: int
    key_length: int
    query_start: int | Tensor = 0
    causal: bool = True
    window: int | None = None
    padding: Tensor | None = None
    segments: Tensor | None = None
    dense: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    _allowed: Tensor | None = field(default=None, repr=False)
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.padding is not None and self.padding.shape[-1] != self.key_length:
            raise AttentionError(
                f"attention_mask covers {self.padding.shape[-1]} keys, attention sees {self.key_length}; "
                "pass one entry for each cached token and each new one"
            )
        if self.dense is not None:
            target = (self.query_length, self.key_length)
            if self.dense.dim() != 4 or tuple(self.dense.shape[-2:]) != target:
                raise AttentionError(
                    f"a dense attention mask must be (batch, heads, {target[0]}, {target[1]}), "
                    f"got {tuple(self.dense.shape)}"
                )
        for name, bound in (("key_start", self.key_start), ("key_end", self.key_end)):
            if bound is not None and bound.dim() != 1:
                raise AttentionError(f"{name} must be (batch,) or (1,), one number a row, got {tuple(bound.shape)}")

    def to(self, device: torch.device) -> AttentionMask:
        """The same mask on another device: made once for each, so that layers there share it."""
        if device == self.device:
            return self
        key = f"to {device}"
        if key not in self.memo:
            names = ("query_start", "padding", "segments", "dense", "key_start", "key_end")
            held = {name: getattr(self, name) for name in names}
            there: dict[str, Any] = {
                name: part.to(device) if isinstance(part, Tensor) else part for name, part in held.items()
            }
            self.memo[key] = replace(self, **there, device=device, memo={}, _allowed=None, _bias={})
        return self.memo[key]

    @property
    def _known_start(self) -> int:
        """``query_start`` where the host knows it, else -1."""
        return -1 if isinstance(self.query_start, Tensor) else self.query_start

    @property
    def _narrow(self) -> bool:
        """Whether the window may hide anything from the last query."""
        if self.window is None:
            return False
        start = self._known_start
        return self.window < (self.key_length if start < 0 else start + self.query_length)

    @property
    def _by_place_alone(self) -> bool:
        """Whether nothing but the host's numbers hides keys."""
        return (
            self.dense is None
            and self.padding is None
            and self.segments is None
            and self.key_start is None
            and self.key_end is None
            and self._known_start >= 0
        )

    @property
    def is_causal_only(self) -> bool:
        """Plain lower-triangular attention over as many keys as queries: no mask tensor is ever needed."""
        return (
            self.causal
            and self._by_place_alone
            and self._known_start == 0
            and self.query_length == self.key_length
            and not self._narrow
        )

    @property
    def sees_everything(self) -> bool:
        """Every query sees every key, as in decoding one token without padding."""
        if not self._by_place_alone or self._narrow:
            return False
        return not self.causal or (self.query_length == 1 and self._known_start == self.key_length - 1)

    def allowed(self) -> Tensor | None:
        """(batch or 1, 1 or heads, query_length, key_length), bool, True = visible; None if nothing is hidden."""
        if self.sees_everything:
            return None
        if self._allowed is None:
            self._allowed = self._materialise()
        return self._allowed

    def _materialise(self) -> Tensor:
        if self.dense is not None:
            return self.dense if self.dense.dtype == torch.bool else self.dense > torch.finfo(self.dense.dtype).min
        keys = torch.arange(self.key_length, device=self.device)
        places = self._places()
        queries = places[:, None]
        if self.causal:
            visible = keys <= queries
        else:
            visible = torch.ones(self.query_length, self.key_length, dtype=torch.bool, device=self.device)
        if self._narrow:
            assert self.window is not None
            visible = visible & (keys > queries - self.window)
        visible = visible[None, None]
        if self.key_start is not None:
            visible = visible & (keys >= self.key_start[:, None, None, None])
        if self.key_end is not None:
            visible = visible & (keys < self.key_end[:, None, None, None])
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, :]
        if self.segments is not None:
            own = self.segments.index_select(1, places.clamp(max=self.key_length - 1))
            visible = visible & (own[:, None, :, None] == self.segments[:, None, None, :])
        return visible

    def _places(self) -> Tensor:
        """(query_length,): the place of each query's own key."""
        if isinstance(self.query_start, Tensor):
            return torch.arange(self.query_length, device=self.device) + self.query_start
        return torch.arange(self.query_start, self.query_start + self.query_length, device=self.device)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The same as an additive bias: 0 where visible, the dtype's most negative number elsewhere."""
        if self.dense is not None and self.dense.dtype != torch.bool:
            return self.dense.to(dtype)
        if (visible := self.allowed()) is None:
            return None
        if dtype not in self._bias:
            hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=visible.device)
            self._bias[dtype] = torch.where(visible, hidden.new_zeros(()), hidden)
        return self._bias[dtype]
