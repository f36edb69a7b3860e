"""Where each weight of a model lives, and where it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import torch

from ..errors import DeviceMapError
from .tree import Slot

DISK: Final = "disk"
"""The place of weights that stay in their own files."""
Place = torch.device | Literal["disk"]
CPU: Final = torch.device("cpu")
ON_DISK: Final = "_loadstone_on_disk"
"""In ``vars(module)``: {attribute: dtype in which it is used} of tensors that stay in their files."""
RUNS_ON: Final = "_loadstone_runs_on"
"""In ``vars(module)``: the device on which a module uses its tensors, where they may live elsewhere; of a whole model,
the device of its inputs."""


class Shortfall(NamedTuple):
    """More than a place may take: what it would have to hold, and its limit, in bytes."""

    place: Place
    needed: int
    limit: int
    reason: str = "weights"

    def __str__(self) -> str:
        return f"{self.place}: {self.needed} bytes of {self.reason}, {self.limit} are allowed"


class Placement(NamedTuple):
    """``table`` maps module or tensor names to places, at name boundaries; the longest name that fits wins.

    Weights on the CPU or on disk beside weights on accelerators visit an accelerator when they are used: the first
    one that the table names. ``offload_buffers``: plain buffers do too, else they live where they are used. ``ahead``:
    whether there is room for the next of what visits beside the one in use; ``reserved``: bytes left free for both.
    ``limits``: bytes that weights may take, by place. ``given``: the caller said where.
    """

    table: dict[str, Place]
    given: bool = True
    offload_buffers: bool = False
    ahead: bool = True
    reserved: int = 0
    limits: Mapping[str, int] = {}
    shortfalls: tuple[Shortfall, ...] = ()

    def find(self, name: str) -> Place | None:
        """The place of a module, parameter or buffer; None if the map does not reach it."""
        table = self.table
        if len(table) == 1 and "" in table:
            return table[""]
        while name:
            if name in table:
                return table[name]
            name = name.rpartition(".")[0]
        return table.get("")

    def place_of(self, name: str, slot: Slot | None = None) -> Place:
        """Where a weight or buffer lives; DeviceMapError if the map does not reach it."""
        if slot is not None and not slot.is_parameter and not slot.is_packed and not self.offload_buffers:
            return self.runs_on(name)
        found = self.find(name)
        if found is None:
            raise DeviceMapError(f"device_map gives no device for {name!r}")
        return found

    def device_of(self, name: str, slot: Slot | None = None) -> torch.device:
        """The device of the tensor that a weight or buffer is: what is on disk is mapped, and thereby on the CPU."""
        place = self.place_of(name, slot)
        return CPU if place == DISK else place

    def accelerator_of(self, name: str) -> torch.device | None:
        """The accelerator on which something lives; None for the CPU, the disk, and what the map does not reach."""
        place = self.find(name)
        return None if place is None or place == DISK or place.type == "cpu" else place

    def runs_on(self, name: str) -> torch.device:
        """Where a module, parameter or buffer is used; what the map does not reach is used on the main device."""
        return self.accelerator_of(name) or self.main_device

    def buffer_device(self, name: str) -> torch.device:
        """Where a buffer lives that no file holds."""
        return self.device_of(name) if self.offload_buffers and self.find(name) is not None else self.runs_on(name)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices in use, in the order of the map."""
        return tuple(dict.fromkeys(CPU if place == DISK else place for place in self.table.values()))

    @property
    def main_device(self) -> torch.device:
        """Where inputs belong and where visitors go: the first accelerator of the map, the CPU if it has none."""
        return next((device for device in self.devices if device.type != "cpu"), CPU)

    @property
    def has_disk(self) -> bool:
        """Whether any weights stay in their files."""
        return DISK in self.table.values()

    @property
    def offloads(self) -> bool:
        """Whether any weights are used elsewhere than where they live."""
        return self.has_disk or (CPU in self.devices and self.main_device != CPU)

    def as_hf(self) -> dict[str, int | str]:
        """In the form of ``model.hf_device_map``: CUDA devices as numbers, others as strings."""
        return {name: _spelled(place) for name, place in self.table.items()}


def needs_dispatch(placement: Placement) -> bool:
    """Whether a placement takes more than tensors in their places: hooks."""
    return placement.has_disk or len(placement.devices) > 1


def _spelled(place: Place) -> int | str:
    if place != DISK and place.type == "cuda" and place.index is not None:
        return place.index
    return str(place)
