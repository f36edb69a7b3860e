"""Devices in every spelling, and whether this machine has them."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..errors import DeviceMapError, nearest

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def device_of_spelling(value: Any, must_exist: bool = True) -> torch.device:
    """The device that a number, a string or a torch.device means; "cuda" is the one of the process's LOCAL_RANK.

    Raises DeviceMapError for what is none, and for what this machine lacks unless ``must_exist`` is false.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise DeviceMapError(
            f"a device is a string such as 'cpu' or 'cuda:0', a number from 0 or a torch.device, not {value!r}"
        )
    if isinstance(value, int):
        if not 0 <= value < 128:  # torch counts them in a byte
            raise DeviceMapError(f"device number {value} is negative or too large; devices are counted from 0")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device(accelerator.type if accelerator is not None else "cuda", value)
    else:
        try:
            device = torch.device(value)
        except RuntimeError as error:
            known = ("cpu", "cuda", "cuda:0", "mps", "xpu", "meta", "disk", *AUTOMATIC)
            raise DeviceMapError(f"unknown device {value!r}{nearest(str(value), known)}") from error
    if device.index is None and device.type not in ("cpu", "meta", "mps"):
        device = torch.device(device.type, local_rank())
    if device.type in ("cpu", "meta", "mps"):
        device = torch.device(device.type)  # 'cpu:0' is the same memory
    if must_exist:
        check_present(device, value)
    return device


def local_rank() -> int:
    """The number of this process among those on the machine, which launchers of several put into the environment."""
    text = os.environ.get("LOCAL_RANK", "0")
    if not text.isdecimal():
        raise DeviceMapError(f"the environment's LOCAL_RANK is {text!r}, which is not a device number")
    return int(text)


def check_present(device: torch.device, value: Any) -> None:
    """DeviceMapError unless this machine has the device that ``value`` spells."""
    if device.type in ("cpu", "meta"):
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        there = "no accelerator" if accelerator is None else f"only {accelerator.type!r}"
        raise DeviceMapError(f"device {value!r} is not available: this machine has {there} that torch can use")
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise DeviceMapError(f"device {value!r} does not exist: there are {count} {device.type!r} devices, from 0")
