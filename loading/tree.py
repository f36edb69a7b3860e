"""The places of a module tree that hold tensors, by name, found in one walk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Slot(NamedTuple):
    """One attribute of one module: a parameter or a buffer. ``tensor`` is what was there when the tree was walked."""

    module: nn.Module
    attribute: str
    tensor: torch.Tensor
    is_parameter: bool

    def put(self, tensor: torch.Tensor) -> None:
        """Assign straight into the module's table: nothing to check, and nn.Module's own way costs 20 times more."""
        table = self.module._parameters if self.is_parameter else self.module._buffers
        table[self.attribute] = tensor  # type: ignore[assignment]

    def get(self) -> torch.Tensor | None:
        table = self.module._parameters if self.is_parameter else self.module._buffers
        return table.get(self.attribute)

    @property
    def is_packed(self) -> bool:
        """Whether it holds codes, or what decodes them: nothing to cast or to initialise."""
        return self.attribute != "bias" and hasattr(type(self.module), "checkpoint_names")


class Tree(NamedTuple):
    """``weights``: parameters and persistent buffers, what a state dict holds, in the order of the modules.

    ``transient``: the other buffers. ``modules``: names of all modules. ``shared``: name to the first name that
    leads to the same tensor (weights tied when the model was built, or one module at two places). ``packed``: the
    layers that hold their weight as codes (`quant.packed.PackedLinear`).
    """

    weights: dict[str, Slot]
    transient: dict[str, Slot]
    modules: dict[str, nn.Module]
    shared: dict[str, str]
    packed: dict[str, nn.Module]

    def slots(self) -> Iterator[tuple[str, Slot]]:
        yield from self.weights.items()
        yield from self.transient.items()


def survey(model: nn.Module) -> Tree:
    """Walk the module tree once."""
    weights: dict[str, Slot] = {}
    transient: dict[str, Slot] = {}
    modules: dict[str, nn.Module] = {}
    shared: dict[str, str] = {}
    packed: dict[str, nn.Module] = {}
    first: dict[int, str] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        modules[prefix[:-1]] = module
        renamed: Any = {}
        if hasattr(type(module), "checkpoint_names"):  # a packed layer: its tensors have other names in files
            renamed = module.checkpoint_names
            packed[prefix[:-1]] = module
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = prefix + renamed.get(attribute, attribute)
                weights[name] = Slot(module, attribute, parameter, True)
                if first.setdefault(id(parameter), name) != name:
                    shared[name] = first[id(parameter)]
        if module._buffers:
            loose = module._non_persistent_buffers_set
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    name = prefix + renamed.get(attribute, attribute)
                    table = transient if attribute in loose else weights
                    table[name] = Slot(module, attribute, buffer, False)
                    if table is weights and first.setdefault(id(buffer), name) != name:
                        shared[name] = first[id(buffer)]
        for attribute, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{attribute}.")

    visit(model, "")
    return Tree(weights, transient, modules, shared, packed)
