"""Layers whose activations are computed again in the backward pass instead of being held."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ..errors import ArgumentError, nearest

_OF_TORCH = ("use_reentrant", "context_fn", "determinism_check", "debug", "preserve_rng_state", "early_stop")


@dataclass(frozen=True)
class Recomputation:
    """Which layers are recomputed, and how.

    every_n_layers: of so many layers the first. offload: what a layer starts from waits in the host's memory, pinned;
    of activations that are there anyway nothing is moved. arguments: of torch's ``checkpoint``, which draws a layer's
    dropout a second time as it was drawn first.
    """

    every_n_layers: int = 1
    offload: bool = False
    arguments: dict[str, Any] = field(default_factory=lambda: {"use_reentrant": False})

    def run(self, index: int, layer: nn.Module, hidden_states: Tensor, *beside: Any) -> Any:
        """What the ``index``-th layer returns."""
        if index % self.every_n_layers:
            return layer(hidden_states, *beside)
        with self._place(hidden_states):
            return checkpoint(layer, hidden_states, *beside, **self.arguments)

    def _place(self, hidden_states: Tensor) -> AbstractContextManager[Any]:
        kind = hidden_states.device.type
        return save_on_cpu(pin_memory=True, device_type=kind) if self.offload and kind != "cpu" else nullcontext()


def recomputation(arguments: Mapping[str, Any] | None, every_n_layers: int = 1, offload: bool = False) -> Recomputation:
    """What a caller asks for, checked; the last two may be among ``arguments`` too, where the Trainer's users put them.

    Raises ArgumentError for an unknown name or a number of layers that is none.
    """
    given = dict(arguments or {})
    every, offload = given.pop("every_n_layers", every_n_layers), given.pop("offload", offload)
    for name in given:
        if name not in _OF_TORCH:
            hint = nearest(name, (*_OF_TORCH, "every_n_layers", "offload"))
            raise ArgumentError(f"gradient checkpointing got an unknown argument {name!r}{hint}")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ArgumentError(f"every_n_layers must be a whole number from 1 on, got {every!r}")
    return Recomputation(every, bool(offload), {"use_reentrant": False, **given})
