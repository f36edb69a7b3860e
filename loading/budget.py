"""Memory that weights may take: ``max_memory`` in every spelling, or what the machine has free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import DeviceMapError
from .devices import device_of_spelling
from .filesystem import free_memory

MaxMemory = Mapping[Any, Any]

SHARE = 0.9  # of what is free; the rest is for activations
_UNITS = {"B": 1, "": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_DIGITS = 40  # beyond some three hundred a float is infinite
_EXAMPLE = "for example {0: '20GiB', 'cpu': '60GiB'}"


class Budget(NamedTuple):
    """Bytes that weights may take: on each accelerator, in the order of their numbers; in the machine's memory; and in
    files, where None is no bound. ``given`` are the limits that the caller set, by place: "cpu", "disk" or a device.
    """

    accelerators: dict[torch.device, int]
    cpu: int
    disk: int | None
    given: dict[str | torch.device, int]

    def by_place(self) -> dict[str, int]:
        """All limits by the name of their place."""
        named = {str(device): room for device, room in self.accelerators.items()}
        return {**named, "cpu": self.cpu, **({} if self.disk is None else {"disk": self.disk})}


def budget(max_memory: MaxMemory | None, *, must_exist: bool = True) -> Budget:
    """The limits of ``max_memory``; what it does not name is not used, but for the CPU's memory and the files.

    None: nine tenths of what is free now on every accelerator, and of the CPU's memory. Keys: numbers from 0 (also as
    text), "cuda:0", "cuda" or a torch.device; "cpu", "mps", "disk". Sizes: bytes, or as in "20GiB", "900MB", "1.5 gb".
    ``must_exist=False``: accelerators that are not on this machine may be named.
    Raises DeviceMapError for other keys and sizes.
    """
    if max_memory is None:
        return Budget(_accelerators_free(), _cpu_free(), None, {})
    if not isinstance(max_memory, Mapping) or not max_memory:
        raise DeviceMapError(f"max_memory must map devices to sizes, {_EXAMPLE}, not {max_memory!r}")
    given: dict[str | torch.device, int] = {}
    for key, size in max_memory.items():
        place = _place(key, must_exist)
        if place in given:
            raise DeviceMapError(f"max_memory names {place!s} twice, the second time as {key!r}")
        given[place] = parse_size(size, f"max_memory[{key!r}]")
    devices = [place for place in given if isinstance(place, torch.device)]
    devices.sort(key=lambda device: (device.type, device.index or 0))
    cpu = given["cpu"] if "cpu" in given else _cpu_free()
    return Budget({device: given[device] for device in devices}, cpu, given.get("disk"), given)


def _cpu_free() -> int:
    return int(cpu_available() * SHARE)


def _place(key: Any, must_exist: bool) -> str | torch.device:
    if isinstance(key, str) and key.strip().isdecimal():
        key = int(key)
    if isinstance(key, str) and key == "disk":
        return "disk"
    try:
        device = device_of_spelling(key, must_exist)
    except DeviceMapError as error:
        raise DeviceMapError(
            f"max_memory: {key!r} is not a device: {error}. Devices are numbers from 0, 'cuda:0', 'cpu', 'mps' or "
            f"'disk', {_EXAMPLE}"
        ) from error
    if device.type == "meta":
        raise DeviceMapError("max_memory: 'meta' has no memory to limit; name real devices, 'cpu' or 'disk'")
    return "cpu" if device.type == "cpu" else device


def parse_size(size: Any, what: str) -> int:
    """Bytes in ``5_000_000``, ``"20GB"`` or ``"18.5 GiB"``; DeviceMapError saying ``what`` is wrong otherwise."""
    if isinstance(size, (int, float)) and not isinstance(size, bool) and math.isfinite(size) and size >= 0:
        return int(size)
    if isinstance(size, str):
        text = size.strip().upper()
        number = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit, number = text[len(number) :], number.strip().replace("_", "")
        if unit in _UNITS and number.replace(".", "", 1).isdecimal() and len(number) <= _DIGITS:
            return int(float(number) * _UNITS[unit]) if "." in number else int(number) * _UNITS[unit]
    raise DeviceMapError(f"{what} must be bytes or a size such as '20GiB' or '900MB', not {size!r}")


def _accelerators_free() -> dict[torch.device, int]:
    """What may be used of each accelerator of this machine."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return {}
    found = {}
    for index in range(torch.accelerator.device_count()):
        device = torch.device(kind.type, index)
        found[device] = int(_free(device) * SHARE)
    return found


def _free(device: torch.device) -> int:
    """Bytes free on an accelerator; of one that shares the CPU's memory, what is free there."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
    if not hasattr(module, "mem_get_info"):
        return cpu_available()
    free = int(module.mem_get_info(device)[0])
    with suppress(AttributeError, RuntimeError):  # what torch holds in reserve it gives to the weights first
        free += int(module.memory_reserved(device)) - int(module.memory_allocated(device))
    return free


def cpu_available() -> int:
    """Bytes that this process can still take: what the machine has, or what its control group leaves it."""
    available = free_memory()
    if available is None:
        try:
            import psutil
        except ImportError as error:
            raise DeviceMapError(
                "cannot find out how much memory this machine has; pass max_memory={'cpu': '60GiB'}, or a device"
            ) from error
        available = int(psutil.virtual_memory().available)
    for limit, usage, statistics in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ):
        with suppress(OSError, ValueError):  # no such group, or no limit in it ("max")
            left = int(Path(limit).read_text()) - int(Path(usage).read_text()) + _inactive_files(statistics)
            available = min(available, max(left, 0))
    return available


def _inactive_files(statistics: str) -> int:
    """Bytes of cached files that the group would give up first; they count as used in it."""
    rows = dict(line.split() for line in Path(statistics).read_text().splitlines())
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
