"""The values that new weights start from; a method of `CausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .causal_lm import CausalLM


def initialize_module(model: CausalLM, module: nn.Module) -> None:
    """Initialise one module's own parameters: normal with ``config.initializer_range``, norms 1, biases 0."""
    std = getattr(model.config, "initializer_range", 0.02)
    if isinstance(module, nn.Linear):
        if module.weight.is_floating_point():  # else codes, which never come from here
            nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
    elif "Norm" in type(module).__name__:
        if getattr(module, "weight", None) is not None:
            nn.init.ones_(module.weight)  # type: ignore[arg-type]
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
