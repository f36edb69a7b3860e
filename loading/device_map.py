"""Every form of ``device_map`` becomes one `Placement`: a checked assignment of names to places."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import DeviceMapError, nearest
from .budget import Budget, MaxMemory, budget
from .devices import AUTOMATIC, device_of_spelling
from .placement import DISK, Place, Placement, Shortfall
from .tree import Tree, survey

DeviceMap = None | str | int | torch.device | Mapping[str, str | int | torch.device]

_SHOWN = 12


def place(
    model: nn.Module,
    device_map: DeviceMap = None,
    *,
    max_memory: MaxMemory | None = None,
    no_split: Collection[str] = (),
    ties: Mapping[str, str] | None = None,
    tree: Tree | None = None,
    offload_buffers: bool = False,
    must_exist: bool = True,
) -> Placement:
    """Normalise ``device_map`` for a model on meta.

    Forms: None (torch's current default device), ``"cpu"``, ``"cuda"`` (the process's LOCAL_RANK), ``"cuda:0"``, 0,
    ``torch.device``, ``"disk"`` (weights stay in their files), ``"meta"`` (leave the model on meta), a dict of module
    or tensor names at any depth (``""`` is all), and ``"auto"``, ``"balanced"``, ``"balanced_low_0"``,
    ``"sequential"``, which share a model out over accelerators, the CPU and the disk within ``max_memory`` (None: what
    is free) without splitting modules of a class in ``no_split`` or weights that are tied.

    ``must_exist=False`` allows devices this machine lacks: a plan for another machine.

    Raises DeviceMapError naming what is unknown, absent, uncovered, or tied and split over devices. More weights than
    ``max_memory`` allows are recorded as the placement's ``shortfalls``, not raised.
    """
    ties = ties or {}
    limits = budget(max_memory, must_exist=must_exist) if max_memory is not None else None
    if device_map is None:
        found: dict[str, Place] = {"": _default_device()}
        placement = Placement(found, given=False)
    elif isinstance(device_map, str) and device_map in AUTOMATIC:
        from .balance import share_out

        tree = tree or survey(model)
        limits = limits or budget(None, must_exist=must_exist)
        shares = share_out(model, device_map, tree, no_split, ties, limits)
        placement = Placement(shares.table, ahead=shares.ahead, reserved=shares.reserved, shortfalls=shares.shortfalls)
    elif isinstance(device_map, Mapping):
        tree = tree or survey(model)
        found = {name: _place(value, must_exist) for name, value in device_map.items()}
        _check_names(found, tree)
        placement = Placement(found)
    else:
        placement = Placement({"": _place(device_map, must_exist)})
    placement = placement._replace(
        offload_buffers=bool(offload_buffers), limits={} if limits is None else limits.by_place()
    )
    if len(placement.table) != 1 or "" not in placement.table:
        assert tree is not None
        _check_cover(placement, tree)
        _check_ties(placement, {**tree.shared, **ties})
        if must_exist and len(placement.devices) > 1 and any(device.type == "meta" for device in placement.devices):
            raise DeviceMapError(
                "device_map mixes 'meta' with real devices; only the whole model can stay on meta ('disk' leaves "
                "weights in their files and computes with them)"
            )
    if limits is not None and limits.given:
        placement = _with_shortfalls(placement, tree or survey(model), ties, limits)
    return placement


def _default_device() -> torch.device:
    device = torch.get_default_device()
    if device.type == "meta":
        raise DeviceMapError(
            "the default device is 'meta', on which weights cannot be loaded; leave the torch.device('meta') context, "
            "or pass device_map='meta' to get a model without weights"
        )
    return torch.device("cpu") if device.type == "cpu" else device


def _place(value: Any, must_exist: bool) -> Place:
    """One value of a map."""
    if isinstance(value, str) and value == "disk":
        return DISK
    return device_of_spelling(value, must_exist)


def _check_names(found: Mapping[str, Place], tree: Tree) -> None:
    for name in found:
        if name not in tree.modules and name not in tree.weights and name not in tree.transient:
            close = nearest(str(name), [*tree.modules, *tree.weights])
            raise DeviceMapError(f"device_map names {name!r}, which the model does not have{close}")


def _check_cover(placement: Placement, tree: Tree) -> None:
    """Every weight needs a device; transient buffers may be left out, they are recomputed."""
    bare = [name for name in tree.weights if placement.find(name) is None]
    if bare or not placement.table:
        raise DeviceMapError(
            f"device_map gives no device for {len(bare)} weights: {_listed(bare)}; add their modules, or '' for all"
        )


def _check_ties(placement: Placement, ties: Mapping[str, str]) -> None:
    for target, source in ties.items():
        one, other = placement.find(target), placement.find(source)
        if one != other:
            raise DeviceMapError(
                f"{target!r} is tied to {source!r}, but device_map puts them on {one} and {other}; "
                "put both modules on one device"
            )


def _with_shortfalls(placement: Placement, tree: Tree, ties: Mapping[str, str], limits: Budget) -> Placement:
    """Note where a placement needs more than the caller's limits."""
    needed: dict[str, int] = {}
    where: dict[str, Place] = {}
    for name, slot in tree.slots():
        if name in tree.shared or name in ties:
            continue
        place = placement.place_of(name, slot) if name in tree.weights else placement.runs_on(name)
        needed[str(place)] = needed.get(str(place), 0) + slot.tensor.nbytes
        where[str(place)] = place
    found = {str(shortfall.place): shortfall for shortfall in placement.shortfalls}
    for key, size in needed.items():
        limit = next((room for given, room in limits.given.items() if str(given) == key), None)
        if limit is not None and size > limit and key not in found:
            found[key] = Shortfall(where[key], size, limit)
    return placement._replace(shortfalls=tuple(found.values()))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
