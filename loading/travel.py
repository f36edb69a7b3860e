"""Activations that follow the weights: hooks that carry what a module is called with to the device it runs on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import AttentionMask

Carry = Callable[[Tensor, torch.device], Tensor]


def carried(value: Any, device: torch.device, carry: Carry, skip: Collection[str] = ()) -> Any:
    """``value`` with the tensors in it, however nested, on ``device``; itself if they all are.

    Caches stay as they are: each of their layers is where it was filled. skip: keys of dictionaries to leave alone.
    """
    if isinstance(value, Tensor):
        return value if value.device == device or value.is_meta else carry(value, device)
    if isinstance(value, AttentionMask):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        parts = [carried(part, device, carry, skip) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        items = {key: part if key in skip else carried(part, device, carry, skip) for key, part in value.items()}
        if all(new is old for new, old in zip(items.values(), value.values(), strict=True)):
            return value
        return items if type(value) is dict else type(value)(items)
    return value


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, once more each time."""
    return tensor.to(device)


def device_in(value: Any) -> torch.device | None:
    """The device of the first tensor in nested containers."""
    if isinstance(value, Tensor):
        return value.device
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := device_in(part)) is not None), None)


class Route:
    """What the hooks of one model share: where inputs belong, and what was carried in the forward that runs."""

    def __init__(self, main: torch.device, skip: Collection[str] = ()) -> None:
        self.main, self.skip = main, tuple(skip)
        self._frames = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"main": self.main, "skip": self.skip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["main"], state["skip"])  # type: ignore[misc]

    def attach(self, model: nn.Module) -> None:
        """Bring the model's inputs to the main device, and what it returns back to where they were."""
        model.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.end, with_kwargs=True, always_call=True)

    def begin(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A forward pre-hook of the whole model."""
        frames = self._frames.__dict__.setdefault("stack", [])
        frames.append((device_in((args, kwargs)), {}))
        return carried(args, self.main, copied), carried(kwargs, self.main, copied, self.skip)

    def end(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """A forward hook of the whole model, called also if it raised."""
        frames = self._frames.__dict__.get("stack")
        device, _ = frames.pop() if frames else (None, None)
        if device is None or output is None or device.type == "meta":
            return None
        moved = carried(output, device, copied, self.skip)
        return None if moved is output else moved

    def carry_beside(self, tensor: Tensor, device: torch.device) -> Tensor:
        """As `copied`, but a tensor that layer after layer is called with (rotary tables) is carried once."""
        frames = self._frames.__dict__.get("stack")
        if not frames:
            return copied(tensor, device)
        memo = frames[-1][1]
        version = None if tensor.is_inference() else tensor._version
        known = memo.get((id(tensor), device))
        if known is None or known[1] != version:
            known = memo[(id(tensor), device)] = (tensor, version, copied(tensor, device))
        return known[2]


class Crossing:
    """Hooks of a module that runs on ``device``; its outputs go on to ``back``, None: stay where they are."""

    def __init__(self, route: Route, device: torch.device, back: torch.device | None) -> None:
        self.route, self.device, self.back = route, device, back

    def attach(self, module: nn.Module) -> None:
        """Hang the hooks on the module, before others."""
        module.register_forward_pre_hook(self.arrive, with_kwargs=True, prepend=True)
        if self.back is not None:
            module.register_forward_hook(self.leave)

    def arrive(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A forward pre-hook."""
        route, device = self.route, self.device
        first = tuple(carried(arg, device, copied, route.skip) for arg in args[:1])
        beside = tuple(carried(arg, device, route.carry_beside, route.skip) for arg in args[1:])
        kept = {
            name: value if name in route.skip else carried(value, device, route.carry_beside, route.skip)
            for name, value in kwargs.items()
        }
        return (*first, *beside), kept

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """A forward hook."""
        assert self.back is not None
        moved = carried(output, self.back, copied, self.route.skip)
        return None if moved is output else moved
