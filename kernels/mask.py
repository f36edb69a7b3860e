"""Which keys each query may see, described rather than materialised.

One description serves all layers of a forward pass. A backend that understands causality, windows or lengths reads
the fields; one that does not asks for `allowed` or `bias`, built on first use and then shared by all layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import AttentionError


@dataclass(eq=False)
class AttentionMask:
    """Description of the visible keys.

    query_length, key_length: sizes of the two axes.
    query_start: place of the first query's own key on the key axis (0 without a cache).
    causal: a query sees its own key and those before it; ``window`` limits that to the last ``window`` keys, its own
        included (``q - window < k <= q``).
    padding: (batch, key_length), bool, True where a key may be seen.
    segments: (batch, key_length), integer; a query sees keys of its own segment only (packed sequences).
    dense: (batch or 1, heads or 1, query_length, key_length), bool (True = visible) or an additive float bias; when
        given it is the whole truth and everything above is ignored.
    """

    query_length: int
    key_length: int
    query_start: int = 0
    causal: bool = True
    window: int | None = None
    padding: Tensor | None = None
    segments: Tensor | None = None
    dense: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
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

    @property
    def _narrow(self) -> bool:
        """Whether the window hides anything from the last query."""
        return self.window is not None and self.window < self.query_start + self.query_length

    @property
    def is_causal_only(self) -> bool:
        """Plain lower-triangular attention over as many keys as queries: no mask tensor is ever needed."""
        return (
            self.causal
            and not self._narrow
            and self.dense is None
            and self.padding is None
            and self.segments is None
            and self.query_start == 0
            and self.query_length == self.key_length
        )

    @property
    def sees_everything(self) -> bool:
        """Every query sees every key, as in decoding one token without padding."""
        if self.dense is not None or self.padding is not None or self.segments is not None:
            return False
        if not self.causal:
            return not self._narrow
        return self.query_length == 1 and self.query_start == self.key_length - 1 and not self._narrow

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
        queries = torch.arange(self.query_start, self.query_start + self.query_length, device=self.device)[:, None]
        if self.causal:
            visible = keys <= queries
        else:
            visible = torch.ones(self.query_length, self.key_length, dtype=torch.bool, device=self.device)
        if self._narrow:
            assert self.window is not None
            visible = visible & (keys > queries - self.window)
        visible = visible[None, None]
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, :]
        if self.segments is not None:
            own = self.segments[:, self.query_start : self.query_start + self.query_length]
            visible = visible & (own[:, None, :, None] == self.segments[:, None, None, :])
        return visible

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
