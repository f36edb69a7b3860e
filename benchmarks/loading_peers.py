"""How each side of `loading_paths` brings a checkpoint's tensors, for every way that it has."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import loading_limits as limits

Load = Callable[[], Any]
PEERS = ("transformers", "safetensors", "fastsafetensors", "runai_model_streamer")


class NoWay(Exception):
    """This side does not have that way; the text says why."""


def loader(side: str, way: str, work: dict[str, Any]) -> Load:
    """A call that brings all tensors by ``way`` and returns what holds them. NoWay if there is none."""
    torch = importlib.import_module("torch")
    dtype = getattr(torch, work["dtype"] if "cast" in way else work["stored"])
    device = "cuda:0" if "GPU" in way else "cpu"
    files = sorted(Path(work["path"]).glob("*.safetensors"))
    if side in ("loadstone", "transformers"):
        return _of_models(side, way, work, device)
    return _SIDES[side](way, files, dtype, device)


def _of_models(side: str, way: str, work: dict[str, Any], device: str) -> Load:
    auto = importlib.import_module(side).AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": work["dtype"] if "cast" in way else work["stored"]}
    if "disk" in way:
        if side == "transformers":
            raise NoWay("offloads to the disk only beside another device")
        options["device_map"] = {"": "disk"}
    elif device != "cpu":
        options["device_map"] = device
    if "read" in way:
        options["disable_mmap"] = True
    return lambda: auto.from_pretrained(work["path"], **options)


def _safetensors(way: str, files: list[Path], dtype: Any, device: str) -> Load:
    if "disk" in way:
        raise NoWay("has no models")
    package = importlib.import_module("safetensors.torch")

    def load() -> Any:
        found: dict[str, Any] = {}
        for file in files:
            there = package.load(file.read_bytes()) if "read" in way else package.load_file(file, device=device)
            while there:
                name, tensor = there.popitem()
                found[name] = tensor.to(dtype)
        return found

    return load


def _fastsafetensors(way: str, files: list[Path], dtype: Any, device: str) -> Load:
    if "mapped" in way or "disk" in way:
        raise NoWay("maps nothing")
    opened = importlib.import_module("fastsafetensors").fastsafe_open

    def load() -> Any:
        with opened(filenames=[str(file) for file in files], nogds=True, device=device) as handle:
            return {name: handle.get_tensor(name).to(dtype) for name in handle.keys()}  # noqa: SIM118

    return load


def _runai(way: str, files: list[Path], dtype: Any, device: str) -> Load:
    if "mapped" in way or "disk" in way:
        raise NoWay("maps nothing")
    streamer = importlib.import_module("runai_model_streamer").SafetensorsStreamer

    def load() -> Any:
        with streamer() as stream:
            stream.stream_files([str(file) for file in files])
            # What it gives is a view of a buffer that it fills again.
            return {name: tensor.to(device, dtype, copy=True) for name, tensor in stream.get_tensors()}

    return load


_SIDES = {"safetensors": _safetensors, "fastsafetensors": _fastsafetensors, "runai_model_streamer": _runai}


def least(way: str, work: dict[str, Any]) -> float:
    """The limit of a way, in seconds. NoWay where there is none but the size of the headers."""
    torch = importlib.import_module("torch")
    files = sorted(Path(work["path"]).glob("*.safetensors"))
    if "touched" in way:
        return limits.touch(files)
    if "cold" in way and "GPU" not in way:
        return limits.read(files, cold=True)
    if "GPU" in way:
        bus = limits.to_device(work["bytes"], torch.device("cuda"))
        return max(bus, limits.read(files, cold=True)) if "cold" in way else bus
    if "read" in way and "cast" not in way:
        return limits.read(files)
    if "cast" in way:
        bare = limits.read_cast if "read" in way else limits.cast
        return bare(files, getattr(torch, work["stored"]), getattr(torch, work["dtype"]))
    raise NoWay("nothing has to be moved")
