"""Where each part of a model goes: every form of ``device_map`` becomes one assignment of names to devices."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import DeviceMapError, nearest
from .tree import Tree, survey

DeviceMap = None | str | int | torch.device | Mapping[str, str | int | torch.device]
MaxMemory = Mapping[str | int, str | int]

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_SHOWN = 12
_NO_DISK = "disk offload is not available in this version of loadstone"


class Placement(NamedTuple):
    """``table`` maps module or tensor names to devices, at name boundaries; the longest name that fits wins."""

    table: dict[str, torch.device]
    given: bool = True

    def device_of(self, name: str) -> torch.device:
        """Device of a module, parameter or buffer; DeviceMapError if the map does not reach it."""
        found = self.find(name)
        if found is None:
            raise DeviceMapError(f"device_map gives no device for {name!r}")
        return found

    def find(self, name: str) -> torch.device | None:
        table = self.table
        if len(table) == 1 and "" in table:
            return table[""]
        while name:
            if name in table:
                return table[name]
            name = name.rpartition(".")[0]
        return table.get("")

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices in use, in the order of the map."""
        return tuple(dict.fromkeys(self.table.values()))

    @property
    def main_device(self) -> torch.device:
        """Where things go that the map need not mention (transient buffers): the first device."""
        return next(iter(self.table.values()))

    def as_hf(self) -> dict[str, int | str]:
        """In the form of ``model.hf_device_map``: CUDA devices as numbers, others as strings."""
        return {
            name: device.index if device.type == "cuda" and device.index is not None else str(device)
            for name, device in self.table.items()
        }


def place(
    model: nn.Module,
    device_map: DeviceMap = None,
    *,
    max_memory: MaxMemory | None = None,
    no_split: Collection[str] = (),
    ties: Mapping[str, str] | None = None,
    tree: Tree | None = None,
    must_exist: bool = True,
) -> Placement:
    """Normalise ``device_map`` for a model on meta.

    Forms: None (torch's current default device), ``"cpu"``, ``"cuda"`` (the process's LOCAL_RANK), ``"cuda:0"``, 0,
    ``torch.device``, ``"meta"`` (leave the model on meta), a dict of module or tensor names at any depth (``""`` is
    all), and ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``, which share a model out over the
    devices within ``max_memory`` without splitting modules of a class in ``no_split``.

    ``must_exist=False`` allows devices this machine lacks: a plan for another machine.

    Raises DeviceMapError naming what is unknown, absent, uncovered, or tied and split over devices.
    """
    ties = ties or {}
    if max_memory is not None:
        _check_max_memory(max_memory)
    if device_map is None:
        return Placement({"": _default_device()}, given=False)
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        tree = tree or survey(model)
        found = _share_out(model, device_map, max_memory, no_split, ties, tree, must_exist)
    elif isinstance(device_map, Mapping):
        tree = tree or survey(model)
        found = {name: _device(value, must_exist) for name, value in device_map.items()}
        _check_names(found, tree)
    else:
        return Placement({"": _device(device_map, must_exist)})
    placement = Placement(found)
    _check_cover(placement, tree)
    _check_ties(placement, {**tree.shared, **ties})
    if must_exist and len(placement.devices) > 1 and any(device.type == "meta" for device in placement.devices):
        raise DeviceMapError("device_map mixes 'meta' with real devices; only the whole model can stay on meta")
    return placement


def _default_device() -> torch.device:
    device = torch.get_default_device()
    if device.type == "meta":
        raise DeviceMapError(
            "the default device is 'meta', on which weights cannot be loaded; leave the torch.device('meta') context, "
            "or pass device_map='meta' to get a model without weights"
        )
    return device


def _device(value: Any, must_exist: bool) -> torch.device:
    """One device of a map."""
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise DeviceMapError(
            f"a device is a string such as 'cpu' or 'cuda:0', a number from 0 or a torch.device, not {value!r}"
        )
    if isinstance(value, int):
        if value < 0:
            raise DeviceMapError(f"device number {value} is negative; devices are counted from 0")
        if value > 127:  # torch counts no further
            raise DeviceMapError(f"there is no device number {value}; devices are counted from 0")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device(accelerator.type if accelerator is not None else "cuda", value)
    elif value == "disk":
        raise DeviceMapError(
            f"device_map says 'disk', but {_NO_DISK}; use 'cpu', whose weights are mapped from the files"
        )
    else:
        try:
            device = torch.device(value)
        except RuntimeError as error:
            known = ("cpu", "cuda", "cuda:0", "mps", "xpu", "meta", *AUTOMATIC)
            raise DeviceMapError(f"unknown device {value!r}{nearest(str(value), known)}") from error
    if device.index is None and device.type in ("cuda", "xpu", "npu"):
        device = torch.device(device.type, _local_rank())
    if device.type == "cpu":
        device = torch.device("cpu")  # 'cpu:0' is the same memory
    if must_exist:
        _check_present(device, value)
    return device


def _local_rank() -> int:
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdecimal():
        raise DeviceMapError(f"the environment's LOCAL_RANK is {text!r}, which is not a device number")
    return int(text)


def _check_present(device: torch.device, value: Any) -> None:
    if device.type in ("cpu", "meta"):
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        there = "no accelerator" if accelerator is None else f"only {accelerator.type!r}"
        raise DeviceMapError(f"device {value!r} is not available: this machine has {there} that torch can use")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise DeviceMapError(f"device {value!r} does not exist: there are {count} {device.type!r} devices, from 0")


def _check_names(found: Mapping[str, torch.device], tree: Tree) -> None:
    for name in found:
        if name not in tree.modules and name not in tree.weights and name not in tree.transient:
            close = nearest(str(name), [*tree.modules, *tree.weights])
            raise DeviceMapError(f"device_map names {name!r}, which the model does not have{close}")


def _check_cover(placement: Placement, tree: Tree) -> None:
    """Every weight needs a device; transient buffers may be left out, they are recomputed."""
    bare = [name for name in tree.weights if placement.find(name) is None] if placement.table else list(tree.weights)
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


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _check_max_memory(max_memory: Any) -> None:
    if not isinstance(max_memory, Mapping) or not max_memory:
        raise DeviceMapError(f"max_memory must map devices to sizes, for example {{0: '20GiB'}}, not {max_memory!r}")
    for device, size in max_memory.items():
        number = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if not number and device not in ("cpu", "mps", "disk"):
            raise DeviceMapError(f"max_memory: devices are numbers from 0, 'cpu', 'mps' or 'disk', not {device!r}")
        parse_size(size, f"max_memory[{device!r}]")


_DIGITS = 40  # beyond some three hundred a float is infinite
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: Any, what: str) -> int:
    """Bytes in ``5_000_000``, ``"20GB"`` or ``"18.5GiB"``; DeviceMapError saying ``what`` is wrong otherwise."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    if isinstance(size, str):
        text = size.strip().upper()
        for unit in sorted(_UNITS, key=len, reverse=True):
            if text.endswith(unit):
                number = text[: -len(unit)].strip()
                if number.replace(".", "", 1).isdecimal() and len(number) <= _DIGITS:
                    return int(float(number) * _UNITS[unit])
    raise DeviceMapError(f"{what} must be bytes or a size such as '20GiB' or '900MB', not {size!r}")


def model_bytes(tree: Tree) -> int:
    """Bytes of all weights and buffers, what is shared counted once."""
    return sum(slot.tensor.nbytes for name, slot in tree.slots() if name not in tree.shared)


def _share_out(
    model: nn.Module,
    kind: str,
    max_memory: MaxMemory | None,
    no_split: Collection[str],
    ties: Mapping[str, str],
    tree: Tree,
    must_exist: bool,
) -> dict[str, torch.device]:
    """The map of accelerate's planner, or all on the CPU where there is nothing to share out."""
    budget = None if max_memory is None else {device: parse_size(size, "") for device, size in max_memory.items()}
    named = [device for device in budget or () if device not in ("cpu", "disk")]
    if must_exist:
        for device in named:
            _device(device, must_exist)
    if not named and torch.accelerator.current_accelerator(check_available=True) is None:
        need = model_bytes(tree) - sum(tree.weights[name].tensor.nbytes for name in ties if name not in tree.shared)
        if budget is not None and need > budget.get("cpu", need):
            raise DeviceMapError(
                f"the model needs {need} bytes, max_memory allows {budget['cpu']} on 'cpu'; {_NO_DISK}"
            )
        return {"": torch.device("cpu")}

    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    allowed = {device: size for device, size in get_max_memory(budget).items() if device != "disk"}
    classes = list(no_split)
    with _tied_on_meta(tree, ties):
        if kind != "sequential":
            allowed = get_balanced_memory(
                model, max_memory=allowed, no_split_module_classes=classes, low_zero=kind == "balanced_low_0"
            )
        found = infer_auto_device_map(model, max_memory=allowed, no_split_module_classes=classes)
    homeless = [name for name, device in found.items() if device == "disk"]
    if homeless:
        raise DeviceMapError(
            f"the model needs {model_bytes(tree)} bytes, device_map={kind!r} may use {allowed}: no room for "
            f"{_listed(homeless)}, and {_NO_DISK}; raise max_memory or load a smaller dtype"
        )
    return {name: _device(device, must_exist) for name, device in found.items()}


class _tied_on_meta:
    """While in it, tied weights of the meta model are one tensor, which is how accelerate knows of ties."""

    def __init__(self, tree: Tree, ties: Mapping[str, str]) -> None:
        self.pairs = [(tree.weights[target], tree.weights[source]) for target, source in ties.items()]

    def __enter__(self) -> None:
        for target, source in self.pairs:
            target.put(source.tensor)

    def __exit__(self, *_: object) -> None:
        for target, _source in self.pairs:
            target.put(target.tensor)
