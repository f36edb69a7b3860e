"""A loaded model made to run: which module gets which hook, so that weights and activations meet on one device.

- A module all of which runs on one device gets what it is called with brought there (`Crossing`). Blocks pass on what
  they return as it is; embeddings, and parts of a block that was split, return it to where they were called from.
- A block with weights elsewhere is visited by them while it runs (`Guest`), the next one's already on their way.
- Embeddings that are offloaded are looked up where they live: a few rows travel, not the table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import OffloadError
from . import taken_off
from .courier import Courier
from .offload import Guest, in_a_row
from .pinned import pinned
from .placement import CPU, DISK, ON_DISK, RUNS_ON
from .plan import Plan
from .travel import Crossing, Route
from .tree import Slot


def dispatch(model: nn.Module, plan: Plan, no_split: Collection[str], skip_keys: str | Sequence[str] | None) -> None:
    """Hang the hooks on a model whose tensors are in the places of its plan. Offloaded weights are frozen."""
    skip = (skip_keys,) if isinstance(skip_keys, str) else tuple(skip_keys or ())
    _Dispatch(model, plan, set(no_split), skip).run()


def undo(model: nn.Module) -> None:
    """Take off all that `dispatch` hung on a model."""
    for module in model.modules():
        before, after, state = module._forward_pre_hooks, module._forward_hooks, module._state_dict_hooks
        for hooks in (before, after, state):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
        for notes, hooks in (
            (module._forward_pre_hooks_with_kwargs, before),
            (module._forward_hooks_with_kwargs, after),
            (module._forward_hooks_always_called, after),
        ):
            for key in [key for key in notes if key not in hooks]:
                del notes[key]
        for name in (ON_DISK, RUNS_ON, taken_off.NAME, "_apply"):
            module.__dict__.pop(name, None)


def _is_ours(hook: Any) -> bool:
    bound = isinstance(getattr(hook, "__self__", None), (Route, Crossing, Guest))
    return bound or isinstance(hook, _Widen) or hook is _in_dtype_of_use


class _Dispatch:
    def __init__(self, model: nn.Module, plan: Plan, blocks: set[str], skip: tuple[str, ...]) -> None:
        self.model, self.plan, self.blocks = model, plan, blocks
        self.placement = plan.placement
        self.main = self.placement.main_device
        self.route = Route(self.main, skip)
        self.guests: dict[torch.device, list[Guest]] = {}
        self.couriers: dict[torch.device, Courier] = {}
        self.hooked: list[nn.Module] = []
        self.slots: dict[int, list[tuple[str, Slot]]] = {}
        for name, slot in plan.tree.slots():
            self.slots.setdefault(id(slot.module), []).append((name, slot))
        self.used_on: dict[str, torch.device] = {}
        self.where: dict[int, set[torch.device]] = {}

    def run(self) -> None:
        self._mark_disk()
        self._find_devices(self.model, self.main, inside=False)
        self._freeze_and_pin()
        if self.main.type != "cpu":
            self.route.attach(self.model)
            self.hooked.append(self.model)
        self._walk("", self.model)
        for guests in self.guests.values():
            in_a_row(guests)
        self.model.__dict__[RUNS_ON] = self.main
        if self.placement.offloads:
            self.model.__dict__[taken_off.NAME] = taken_off.Kept(self.main)
        hooked = {id(module) for module in self.hooked}
        for module in self.model.modules():
            if any(id(inner) in hooked for inner in module.modules()):
                module.__dict__["_apply"] = partial(_refuse_moves, module)

    def _mark_disk(self) -> None:
        """Note on each module which of its tensors stay in files, and in which dtype they are used."""
        weights = self.plan.tree.weights
        marks = {id(weights[move.target].get()): move.dtype for move in self.plan.moves if move.transform == "disk"}
        for slot in weights.values():
            if (tensor := slot.get()) is not None and id(tensor) in marks:
                vars(slot.module).setdefault(ON_DISK, {})[slot.attribute] = marks[id(tensor)]
                if tensor.dtype != marks[id(tensor)] and _in_dtype_of_use not in slot.module._state_dict_hooks.values():
                    slot.module.register_state_dict_post_hook(_in_dtype_of_use)

    def _is_block(self, module: nn.Module) -> bool:
        return type(module).__name__ in self.blocks

    def _find_devices(self, module: nn.Module, home: torch.device, *, inside: bool) -> set[torch.device]:
        """On which devices what a module holds is used. home: where offloaded weights go. inside: of a block."""
        if self._is_block(module) and not inside:
            home, inside = self._device_of_block(module), True
        found = set()
        for name, slot in self.slots.get(id(module), ()):
            device = self.placement.accelerator_of(name)
            if device is None:
                placed = self.placement.find(name) is not None
                device = CPU if placed and not inside and _is_looked_up(slot.module) else home
            self.used_on[name] = device
            found.add(device)
        for child in module.children():
            found |= self._find_devices(child, home, inside=inside)
        self.where[id(module)] = found
        return found

    def _device_of_block(self, block: nn.Module) -> torch.device:
        """Where a block's offloaded weights go: to the accelerator that holds the first of it, else the main device."""
        for module in block.modules():
            for name, _slot in self.slots.get(id(module), ()):
                if (device := self.placement.accelerator_of(name)) is not None:
                    return device
        return self.main

    def _freeze_and_pin(self) -> None:
        """Offloaded weights get no gradients; those in memory that visit a GPU move to where it reads them directly."""
        visitors: dict[torch.device, dict[int, list[Slot]]] = {}
        for name, slot in self.plan.tree.weights.items():
            tensor = slot.get()
            place = self.placement.place_of(name, slot)
            offloaded = place == DISK or (place == CPU and self.main.type != "cpu")
            if tensor is None or not offloaded:
                continue
            if slot.is_parameter:
                tensor.requires_grad_(False)
            if place == CPU and self.used_on[name].type == "cuda":
                visitors.setdefault(self.used_on[name], {}).setdefault(id(tensor), []).append(slot)
        for device, found in visitors.items():
            seats = list(found.values())
            for number, copy in pinned((_value(slots[0]) for slots in seats), device):
                original = seats[number][0].get()
                kind: Any = type(original)
                copy = kind(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy
                for slot in seats[number]:
                    slot.put(copy)

    def _walk(
        self, name: str, module: nn.Module, depth: int = 0, glue: torch.device | None = None, inside: bool = False
    ) -> None:
        """Hooks for a module and what is in it. glue: where the split module that it is part of runs; inside: whether
        that is a block."""
        devices = self.where[id(module)]
        if not devices:
            return
        inside = inside or self._is_block(module)
        called = type(module).forward is not nn.Module.forward  # a ModuleList is not
        if len(devices) == 1 and called:
            (device,) = devices
            if glue not in (None, device) or (glue is None and self.where[id(self.model)] != devices):
                self._cross(module, device, glue if glue is not None else self._back(name, module, depth))
            self._visits(module, device, inside)
            return
        if called and depth and (inside or glue is not None or self.slots.get(id(module))):
            back = glue if glue is not None else self._back(name, module, depth)
            glue = self._device_of_split(module)
            self._cross(module, glue, back)
        small: list[nn.Module] = []
        if called and (glue is not None or self.slots.get(id(module))):
            # What a module holds itself comes to where it runs, and so do norms, which may be used without a call.
            here = glue if glue is not None else self.main
            self._guest(module, [module], here, deep=False)
            if inside:
                small = [child for child in module.children() if self.where[id(child)] and self._only_vectors(child)]
                self._guest(module, small, here, deep=True)
        for key, child in module.named_children():
            if not any(child is one for one in small):
                self._walk(f"{name}.{key}" if name else key, child, depth + 1, glue, inside)

    def _back(self, name: str, module: nn.Module, depth: int) -> torch.device | None:
        """Where a part of a container that is spread over devices returns to: before the blocks to the main device,
        from the blocks on nowhere, as the next part fetches what it needs."""
        if isinstance(module, nn.Embedding):
            return self.main
        if depth <= 1 or self._is_block(module):
            return None
        for child in self.model.get_submodule(name.rpartition(".")[0]).children():
            if child is module:
                return self.main
            if any(self._is_block(inner) for inner in child.modules()):
                return None
        return self.main

    def _device_of_split(self, module: nn.Module) -> torch.device:
        """Of the devices that a module's parts run on, the first accelerator's."""
        names = [name for inner in module.modules() for name, _ in self.slots.get(id(inner), ())]
        devices = [self.used_on[name] for name in names]
        return next((device for device in devices if device.type != "cpu"), self.main)

    def _only_vectors(self, module: nn.Module) -> bool:
        slots = [slot for inner in module.modules() for _, slot in self.slots.get(id(inner), ())]
        return all(slot.tensor.dim() < 2 for slot in slots)

    def _cross(self, module: nn.Module, device: torch.device, back: torch.device | None) -> None:
        Crossing(self.route, device, back).attach(module)
        self.hooked.append(module)

    def _visits(self, module: nn.Module, device: torch.device, inside: bool) -> None:
        """Guests of a module that runs on one device: of its blocks, and of each module outside of them."""
        if inside or self._is_block(module):
            self._guest(module, [module], device, deep=True)
            return
        self._guest(module, [module], device, deep=False)
        for child in module.children():
            self._visits(child, device, inside=False)

    def _guest(self, host: nn.Module, modules: list[nn.Module], device: torch.device, *, deep: bool) -> None:
        owners = [owner for module in modules for owner in (module.modules() if deep else (module,))]
        owners = [owner for owner in owners if id(owner) in self.slots]
        if not owners:
            return
        for owner in owners:
            vars(owner)[RUNS_ON] = device
        if not deep and device.type == "cpu" and _is_looked_up(owners[0]):
            guest = Guest([], device, readers=owners)
            if _in_other_dtype(owners[0], "weight"):
                owners[0].register_forward_hook(_Widen(vars(owners[0])[ON_DISK]["weight"]))
                self.hooked.append(owners[0])
        else:
            guest = Guest(modules, device, self._courier(device), deep=deep)
        if any(vars(owner).get(ON_DISK) for owner in owners) or any(True for _ in guest.seats()):
            guest.attach(host)
            self.guests.setdefault(device, []).append(guest)
            self.hooked.append(host)

    def _courier(self, device: torch.device) -> Courier | None:
        if device.type == "cpu":
            return None
        return self.couriers.setdefault(device, Courier(device, self.placement.ahead))


class _Widen:
    """A forward hook that gives what an embedding in its file's dtype returns the dtype in which it is used."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)


def _is_looked_up(module: nn.Module) -> bool:
    """Whether it is an embedding that only reads rows."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None


def _value(slot: Slot) -> Tensor:
    return cast(Tensor, slot.get())


def _held(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name)
    return module._buffers[name] if tensor is None else tensor  # type: ignore[return-value]


def _in_other_dtype(module: nn.Module, name: str) -> bool:
    dtype = vars(module).get(ON_DISK, {}).get(name)
    return dtype is not None and _held(module, name).dtype != dtype


def _in_dtype_of_use(module: nn.Module, state_dict: Any, prefix: str, _metadata: Any) -> None:
    """A state dict's hook: weights that stay in a file of another dtype come out in that in which they are used."""
    for name, dtype in vars(module).get(ON_DISK, {}).items():
        if (tensor := state_dict.get(prefix + name)) is not None and tensor.dtype != dtype:
            state_dict[prefix + name] = tensor.to(dtype)


def _refuse_moves(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """In the place of ``module._apply``: OffloadError for whatever would change where weights are, or their dtype."""
    tensors = [*module.parameters(), *module.buffers()]
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors if not tensor.is_meta}
    for device, dtype in kinds:
        probe = torch.empty(0, dtype=dtype, device=device)
        changed = fn(probe)
        if changed.device != device or changed.dtype != dtype:
            raise OffloadError(
                f"this {type(module).__name__} is spread over devices (see model.hf_device_map), so it cannot be moved "
                f"to {changed.device} or cast to {str(changed.dtype).removeprefix('torch.')} as a whole: load it again "
                "with the device_map= and dtype= that you want"
            )
    return type(module)._apply(module, fn, recurse)
