"""Generation on a device mesh: ranks that share weights run the model equally often, though their texts end apart.

Before each call of the model the ranks say that they go on. One that is done answers until all are, with calls whose
results nobody needs, so that the others get its share of the weights.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Company:
    """The ranks that generate together. A context: whoever leaves it goes on answering until all have left."""

    def __init__(self, model: Any) -> None:
        layout = model.layout
        self._model, self._device = model, model.device
        self._sharers = None if layout.fsdp is None else layout.fsdp.get_group(layout.fsdp.ndim - 1)
        self._workers = None if layout.tp is None else layout.tp.get_group()

    def __enter__(self) -> Company:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sharers is None:
            return
        ids = torch.zeros((1, 1), dtype=torch.long, device=self._device)
        with torch.no_grad():
            while self._anyone(False):
                self._model(input_ids=ids, use_cache=False)

    def step(self) -> None:
        """Say that this rank calls the model now."""
        if self._sharers is not None:
            self._anyone(True)

    def agreed(self, drawn: Tensor) -> Tensor:
        """What the first of the ranks that work on one text has drawn."""
        if self._workers is not None:
            drawn = drawn.contiguous()
            dist.broadcast(drawn, group=self._workers, group_src=0)
        return drawn

    def _anyone(self, mine: bool) -> bool:
        count = torch.tensor([int(mine)], device=self._device)
        dist.all_reduce(count, group=self._sharers)
        return bool(count.item())


def company_of(model: Any) -> Company | None:
    """The company of a model on a device mesh, None for any other (or one that a library has wrapped)."""
    return None if getattr(model, "layout", None) is None else Company(model)
