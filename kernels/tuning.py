"""Block sizes: a table for each GPU generation, shipped with the package, and what a search on this machine found.

Nothing is searched for when a kernel is first called. `loadstone tune` searches, and what it finds is kept in
``$LOADSTONE_CACHE`` (default ``~/.cache/loadstone``) and wins over the shipped table on the same kind of GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import KernelError
from . import support

Blocks = Mapping[str, int]
TABLES = Path(__file__).parent / "tables"
GENERATIONS = ("sm_80", "sm_86", "sm_90", "gfx942", "interpreter")


def generation(device: torch.device) -> str:
    """The table that serves a device: by compute capability, for GPUs alike in shared memory and matrix instructions.

    "sm_80": A100 and Orin; "sm_86": GPUs of 100 KB of shared memory (8.6, 8.9, 12.x); "sm_90": Hopper and the
    data-centre Blackwells; "gfx942": AMD. "interpreter": small blocks, for Triton's interpreter.
    """
    return _stand_in or _generation(device.type, device.index)


_stand_in: str | None = None


@contextlib.contextmanager
def as_generation(name: str) -> Iterator[None]:
    """While active, every device counts as one of generation ``name``: kernels are compiled for GPUs not at hand."""
    global _stand_in
    before, _stand_in = _stand_in, name
    try:
        yield
    finally:
        _stand_in = before


_tried: dict[tuple[str, str], Blocks] = {}


@contextlib.contextmanager
def trying(kernel: str, shape_class: str, sizes: Blocks) -> Iterator[None]:
    """While active, a kernel runs with these sizes for a class of shapes, in all threads: how a search tries them."""
    _tried[kernel, shape_class] = sizes
    try:
        yield
    finally:
        del _tried[kernel, shape_class]


@lru_cache(maxsize=64)
def _generation(kind: str, index: int | None) -> str:
    if kind != "cuda" or support.interpreting():
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    return "sm_86" if major >= 12 else "sm_90"


def blocks(kernel: str, shape_class: str, device: torch.device) -> Blocks:
    """Block sizes, ``num_warps`` and ``num_stages`` of a kernel for a class of shapes on a device.

    Raises KernelError if a tuned file is malformed.
    """
    if _tried and (tried := _tried.get((kernel, shape_class))) is not None:
        return tried
    name = None if _stand_in else _device_name(device.type, device.index)
    return _blocks(kernel, shape_class, generation(device), name)


@lru_cache(maxsize=1024)
def _blocks(kernel: str, shape_class: str, generation: str, device_name: str | None) -> Blocks:
    tuned = tuned_table(device_name) if device_name is not None else {}
    found = tuned.get(kernel, {}).get(shape_class)
    shipped = shipped_table(generation)[kernel][shape_class]
    if found is not None and device_name is not None and found.keys() != shipped.keys():
        raise KernelError(
            f"{tuned_path(device_name)} was tuned for another version: it gives {kernel} {', '.join(sorted(found))}, "
            f"the kernel takes {', '.join(sorted(shipped))}; delete it, `loadstone tune` makes a new one"
        )
    return shipped if found is None else found


def device_name(device: torch.device) -> str | None:
    """The kind of GPU that tuned sizes are kept for, None where there is none."""
    return _device_name(device.type, device.index)


@lru_cache(maxsize=64)
def _device_name(kind: str, index: int | None) -> str | None:
    if kind != "cuda" or support.interpreting():
        return None
    return torch.cuda.get_device_name(index)


@lru_cache(maxsize=8)
def shipped_table(generation: str) -> dict[str, dict[str, Blocks]]:
    """{kernel: {shape class: blocks}} of the package for a generation; a file of `TABLES` holds those of one family of
    kernels as {generation: {kernel: {shape class: blocks}}}."""
    table: dict[str, dict[str, Blocks]] = {}
    for file in sorted(TABLES.glob("*.json")):
        table.update(json.loads(file.read_text(encoding="utf-8"))[generation])
    return table


def tuned_path(device_name: str) -> Path:
    """Where `loadstone tune` keeps what it found for a kind of GPU."""
    root = os.environ.get("LOADSTONE_CACHE") or Path.home() / ".cache" / "loadstone"
    return Path(root) / "tuned" / (re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-") + ".json")


@lru_cache(maxsize=8)
def tuned_table(device_name: str) -> dict[str, dict[str, Blocks]]:
    """{kernel: {shape class: blocks}} that a search found on this machine, empty without one.

    Raises KernelError, naming the file, if it is not a table of whole numbers.
    """
    path = tuned_path(device_name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    try:
        table = json.loads(text)["kernels"]
        for row in table.values():
            for entry in row.values():
                if not all(type(value) is int and 0 <= value <= 1 << 16 for value in entry.values()):
                    raise ValueError(f"{entry} holds something that is not a size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KernelError(
            f"{path} is not a table of tuned block sizes ({error}); delete it, `loadstone tune` makes a new one"
        ) from error
    return table


def keep_tuned(device_name: str, table: Mapping[str, Mapping[str, Blocks]], about: Mapping[str, Any]) -> Path:
    """Write what a search found, whole or not at all, and use it from now on; returns the file's path.

    about: versions and date, kept beside the table for the reader.
    """
    path = tuned_path(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    staged.write_text(json.dumps({"device": device_name, **about, "kernels": table}, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)
    tuned_table.cache_clear()
    _blocks.cache_clear()
    return path
