"""Weights that were added to a model after it was wrapped for FSDP, above all adapters': shared out layer by layer.

FSDP gathers what belongs to a module when that module runs. Matrices that were added all over a layer belong to one
that stands at its door: hidden states pass through it before the layer sees them, so that the matrices are gathered at
once, and their gradients reduced at once when the backward pass comes out there. One by one each would cost a
collective in either direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from .parallel_mesh import Layout
from .parallel_shard import shard

_NAME = "added_{}"


class Door(nn.Module):
    """What has a layer's added matrices gathered. ``added``: the modules that hold them, at their own places."""

    def __init__(self, added: Sequence[nn.Module]) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(added)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states: any shape → a copy, with a gradient even where they have none: FSDP acts when it passes."""
        if not torch.is_grad_enabled():
            return states
        return states.clone() if states.requires_grad else states.clone().requires_grad_()


def by_layer(model: nn.Module, names: Sequence[str]) -> list[tuple[str | None, list[str]]]:
    """Names of modules, in their order, with the layer that FSDP gathers at once and that each is in; None: in none."""
    from torch.distributed.fsdp import FSDPModule

    modules = dict(model.named_modules())
    root = next(name for name, module in modules.items() if isinstance(module, FSDPModule))

    def layer_of(name: str) -> str | None:
        parts = name.split(".")
        owners = (".".join(parts[:end]) for end in range(1, len(parts)))
        return next((one for one in owners if one != root and isinstance(modules[one], FSDPModule)), None)

    return [(layer, list(found)) for layer, found in groupby(names, layer_of)]


def share_added(
    layer: nn.Module | None, added: Sequence[nn.Module], layout: Layout, wanted: Callable[[], bool] | None = None
) -> None:
    """Shard the weights of ``added``, modules within ``layer``; None: in no layer, each gathers its own.

    wanted: says before a forward of the layer whether it will use them. They stay gathered until the backward pass.
    """
    if layer is None:
        for module in added:
            shard(module, layout, reshard_after_forward=False)
        return
    door = Door(added)
    shard(door, layout, reshard_after_forward=False)
    del door.matrices  # FSDP knows where they are; their names are those of their own places
    number = sum(isinstance(child, Door) for child in layer.children())
    while hasattr(layer, _NAME.format(number)):
        number += 1
    layer.add_module(_NAME.format(number), door)

    def through(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if wanted is not None and not wanted():
            return None
        if args:
            return (door(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: door(kwargs[first])}

    door.__dict__["added"] = list(added)
    door.__dict__["hook"] = layer.register_forward_pre_hook(through, with_kwargs=True)


def close_doors(model: nn.Module) -> None:
    """Take out the doors to matrices that are no longer in the model."""
    here = set(model.modules())
    for module in list(here):
        for name, child in list(module.named_children()):
            if isinstance(child, Door) and here.isdisjoint(child.__dict__["added"]):
                child.__dict__["hook"].remove()
                delattr(module, name)
