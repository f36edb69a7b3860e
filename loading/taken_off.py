"""What code that knows accelerate's hooks hears of ours when it wants to take them off.

accelerate keeps a hook as ``module._hf_hook`` and takes it off by its ``detach_hook``. ``PeftModel.from_pretrained``
does so with every model that has offloaded weights, and dispatches it anew by a map of its own, weight by weight and
past our hooks: limits would be exceeded, and weights of another dtype than their file's would lose theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import OffloadError

NAME = "_hf_hook"


class Kept:
    """Stands on a dispatched model in the place of a hook of accelerate's, which does nothing but be asked to go."""

    no_grad = False

    def __init__(self, main: torch.device) -> None:
        self.main = main

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module

    def pre_forward(self, _module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def post_forward(self, _module: nn.Module, output: Any) -> Any:
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """OffloadError, unless the CPU is all there is: then what dispatches anew finds everything in its place."""
        if self.main.type == "cpu" and not torch.accelerator.is_available():
            return module
        raise OffloadError(
            f"this {type(module).__name__} has offloaded weights (see model.hf_device_map), and accelerate, or "
            "PeftModel.from_pretrained by it, would take its hooks off and spread it anew: load an adapter with "
            "model.load_adapter(directory), or fill PEFT's own with get_peft_model and set_peft_model_state_dict; for "
            "another device map load the model again"
        )
