"""Values for what no file holds: missing weights as the architecture says, and buffers that are recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..errors import InitializationError
from .memory import check_memory
from .placement import Placement
from .tree import Slot, Tree

Initializer = Callable[[nn.Module], None]


def initialize_missing(
    model: nn.Module, tree: Tree, names: Sequence[str], placement: Placement, initialize: Initializer | None
) -> dict[str, torch.Tensor]:
    """Values of the weights ``names``; call it while the rest of the model is still on meta.

    The weights appear in the model on their devices, filled with NaN, and ``initialize`` is called once for each
    module that holds some, inner ones first as in ``model.apply``, for an outer one may have the last word. Everything
    else is on meta meanwhile, so whatever an initialiser touches, loaded weights are out of its reach. The model keeps
    these tensors until the caller assigns or restores.

    Raises InitializationError for weights that no one initialised, MemoryLimitError for more than memory holds.
    """
    if not names:
        return {}
    if initialize is None:
        raise InitializationError(
            f"{len(names)} weights are not in the checkpoint and nothing was given to initialise them: "
            f"{', '.join(names[:12])}"
        )
    slots = {name: tree.weights[name] for name in names}
    devices = {name: placement.device_of(name, slot) for name, slot in slots.items()}
    on_cpu = [slot.tensor.nbytes for name, slot in slots.items() if devices[name].type == "cpu"]
    check_memory(sum(on_cpu), f"initialising the {len(on_cpu)} weights that are not in the checkpoint")
    for name, slot in slots.items():
        blank = _blank(slot.tensor, devices[name])
        slot.put(nn.Parameter(blank, requires_grad=slot.tensor.requires_grad) if slot.is_parameter else blank)
    with torch.no_grad():
        for path, module in _concerned(model, names):
            own = set(module._parameters)
            try:
                initialize(module)
            except Exception as error:
                raise InitializationError(
                    f"initialising {path!r} ({type(module).__name__}) failed: {type(error).__name__}: {error}"
                ) from error
            for added in set(module._parameters) - own:
                del module._parameters[added]
                raise InitializationError(f"initialising replaced {path!r} by a module with a weight {added!r} more")
    for name, slot in slots.items():  # persistent buffers that a file lacks
        if not slot.is_parameter and callable(getattr(slot.module, "reset_buffers", None)):
            _reset(name.rpartition(".")[0], slot.module, devices[name])
    return {name: _checked(name, slot, devices[name]) for name, slot in slots.items()}


def _concerned(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules on the way from the model to each weight, inner ones first."""
    paths = {"": None}
    for name in names:
        parts = name.split(".")[:-1]
        paths.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    depth = sorted(paths, key=lambda path: path.count(".") + bool(path), reverse=True)
    return [(path, model.get_submodule(path)) for path in depth]


def recompute_buffers(tree: Tree, placement: Placement) -> dict[str, torch.Tensor]:
    """Transient buffers on their devices, recomputed by their module's ``reset_buffers(device)`` where on meta.

    They never come from a file and are never cast. A module left out of the device map uses the main device.
    Raises InitializationError for a module that cannot recompute its buffers.
    """
    modules: dict[int, list[tuple[str, Slot]]] = {}
    for name, slot in tree.transient.items():
        modules.setdefault(id(slot.module), []).append((name, slot))
    done: dict[str, torch.Tensor] = {}
    for group in modules.values():
        name, slot = group[0]
        device = placement.buffer_device(name)
        if any(slot.tensor.is_meta for _, slot in group):
            _reset(name.rpartition(".")[0], slot.module, device)
        for name, slot in group:
            value = slot.get()
            if value is None:
                continue
            if value.is_meta:
                raise InitializationError(f"{type(slot.module).__name__}.reset_buffers left {name!r} on meta")
            done[name] = value.to(device)
    return done


def check_buffers(tree: Tree) -> None:
    """InitializationError now, before anything is read, for buffers that could not be recomputed later."""
    for name, slot in tree.transient.items():
        if slot.tensor.is_meta and not callable(getattr(slot.module, "reset_buffers", None)):
            raise _cannot_reset(name, slot.module)


def _reset(name: str, module: nn.Module, device: torch.device) -> None:
    reset = getattr(module, "reset_buffers", None)
    if not callable(reset):
        raise _cannot_reset(name, module)
    try:
        with torch.no_grad():
            reset(device)
    except Exception as error:
        raise InitializationError(
            f"reset_buffers of {name!r} ({type(module).__name__}) failed: {type(error).__name__}: {error}"
        ) from error


def _cannot_reset(name: str, module: nn.Module) -> InitializationError:
    return InitializationError(
        f"buffer {name!r} is on meta and not persistent, and {type(module).__name__} has no method "
        "reset_buffers(device) to recompute it; write one, or register the buffer as persistent"
    )


def _blank(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor full of what no initialiser leaves: NaN, or the smallest integer."""
    blank = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.dtype.itemsize == 1:
        blank.view(torch.uint8).fill_(255)  # NaN in float8, -1 in int8
    elif like.dtype.is_floating_point or like.dtype.is_complex:
        blank.fill_(float("nan"))
    else:
        blank.fill_(torch.iinfo(like.dtype).min)
    return blank


def _checked(name: str, slot: Slot, device: torch.device) -> torch.Tensor:
    """What the initialiser left in a slot, if that is a value."""
    value, wanted = slot.get(), slot.tensor
    if value is None or value.shape != wanted.shape or value.dtype != wanted.dtype or value.device != device:
        raise InitializationError(
            f"initialising replaced {name!r}, {wanted.dtype} of shape {tuple(wanted.shape)}, by something else"
        )
    if value.numel() and _untouched(value.detach()):
        raise InitializationError(
            f"weight {name!r} is not in the checkpoint and {type(slot.module).__name__}'s initialisation leaves it "
            "undefined; initialise it there"
        )
    return value


def _untouched(value: torch.Tensor) -> bool:
    if value.dtype.itemsize == 1:
        return bool((value.view(torch.uint8) == 255).all())
    if value.dtype.is_complex:
        value = torch.view_as_real(value)
    if value.dtype.is_floating_point:
        return bool(value.amax().isnan())  # one NaN anywhere makes the maximum NaN
    return bool((value == torch.iinfo(value.dtype).min).all())
