"""State dicts in the shapes of checkpoints, of weights that have another shape while they are tensor-parallel.

A projection that holds several matrices side by side is cut through each of them, which no distributed tensor of its
usual shape can say. Its state, and that of its optimizer, is handed out in the usual shape, sharded by rows, and taken
back in that shape: `torch.distributed.checkpoint` then loads what any other mesh, or none, has saved.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .parallel_shard import distributed

_SHAPE = "checkpoint_shape"  # an attribute of the parameters concerned: they outlive wrappers, and optimizers hold them
_known: WeakSet[torch.optim.Optimizer] = WeakSet()


def usual_states(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give state dicts of ``model``, and of any optimizer of its parameters, the ``shapes`` that checkpoints have."""
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module._parameters[attribute], _SHAPE, shape)
        module.register_state_dict_post_hook(functools.partial(_hand_out, attribute))
        module.register_load_state_dict_pre_hook(functools.partial(_take_back, attribute))
    if shapes:
        _watch_optimizers()


@torch.no_grad()
def usual(tensor: Any, shape: tuple[int, ...]) -> Any:
    """A distributed tensor (rows, matrices, columns) in ``shape``, which has a dimension less: a copy, its rows shared
    out over every dimension of the mesh that cut it. All ranks of the mesh have to ask."""
    from torch.distributed.tensor import Replicate, Shard

    rows = tuple(Replicate() if place.is_replicate() else Shard(0) for place in tensor.placements)
    return _reshaped(tensor.redistribute(placements=rows), shape)


@torch.no_grad()
def parallel(tensor: Any, like: Any) -> Any:
    """What `usual` was given; also of one that is sharded otherwise, or whole, and then in the shape alone."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(tensor, DTensor):
        return tensor.reshape(like.shape)
    rows = tuple(Shard(0) if place == Shard(0) else Replicate() for place in tensor.placements)
    by_rows = _reshaped(tensor.redistribute(placements=rows), like.shape)
    return _reshaped(by_rows.redistribute(placements=like.placements), like.shape)


def _reshaped(tensor: Any, shape: tuple[int, ...]) -> Any:
    """A distributed tensor, sharded by rows or not reshaped, in another shape; nothing of it is still on its way."""
    local = tensor.to_local()
    if tuple(tensor.shape) != tuple(shape):
        local = local.reshape(len(local), *shape[1:])
    return distributed(local, tensor.device_mesh, tensor.placements, shape)


def _hand_out(attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    held = state.get(prefix + attribute)
    if held is None or isinstance(held, nn.Parameter):  # keep_vars=True asks for the parameters themselves
        return
    state[prefix + attribute] = usual(held, getattr(module._parameters[attribute], _SHAPE))


def _take_back(attribute: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    given, held = state.get(prefix + attribute), module._parameters[attribute]
    if isinstance(given, torch.Tensor) and tuple(given.shape) == getattr(held, _SHAPE):
        state[prefix + attribute] = parallel(given, held)


@functools.cache
def _watch_optimizers() -> None:
    """Look at each optimizer once, at its first step: before it there is no state to be handed out."""
    register_optimizer_step_pre_hook(_first_step)


def _first_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _known:
        return
    _known.add(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(hasattr(parameter, _SHAPE) for parameter in parameters):
        return
    for parameter in parameters:  # loaded before anything here saw the optimizer
        if hasattr(parameter, _SHAPE) and parameter in optimizer.state:
            optimizer.state[parameter] = _changed(optimizer.state[parameter], parameter, back=True)
    optimizer.register_state_dict_post_hook(functools.partial(_optimizer_state, back=False))
    optimizer.register_load_state_dict_pre_hook(functools.partial(_optimizer_state, back=True))


def _optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], *, back: bool) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    held = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=False):  # what does not fit is torch's to refuse
        if hasattr(parameter, _SHAPE) and number in held:
            held[number] = _changed(held[number], parameter, back)
    return {**state, "state": held}


def _changed(values: Mapping[str, Any], parameter: nn.Parameter, back: bool) -> dict[str, Any]:
    """The state of one parameter, what has the parameter's shape in that of checkpoints, or ``back``."""
    shape: tuple[int, ...] = getattr(parameter, _SHAPE)
    before = shape if back else tuple(parameter.shape)
    changed = dict(values)
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and tuple(value.shape) == before:
            changed[name] = parallel(value, parameter) if back else usual(value, shape)
    return changed
