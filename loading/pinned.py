"""Weights in memory that a GPU reads directly.

torch's own pinned allocator rounds every size up to a power of two, which for weights can cost as much again. Here
plain memory is registered with CUDA instead, a few weights to a region, and unregistered before it is given back.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

logger = logging.getLogger("loadstone.loading")

REGION = 64 << 20
"""Bytes of a region, unless one weight is larger."""
_ALIGNMENT = 64


def pinned(tensors: Iterable[Tensor], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(number, contiguous copy in memory that ``device`` reads directly) of CPU tensors, region by region.

    No tensor is held once its copy was given out. Where CUDA registers no more, the copies are in plain memory, and a
    warning is logged.
    """
    group: list[Tensor] = []
    first = size = 0
    for number, tensor in enumerate(tensors):
        count = _rounded(tensor.nbytes)
        if group and size + count > REGION:
            yield from enumerate(_copied(group, size, device), first)
            first, size = number, 0
            group.clear()
        group.append(tensor)
        size += count
    yield from enumerate(_copied(group, size, device), first)


def _copied(group: Sequence[Tensor], size: int, device: torch.device) -> list[Tensor]:
    """Copies that share a region."""
    storage = _region(size, device) if size else None
    copies = []
    begin = 0
    for tensor in group:
        copy = torch.empty(0, dtype=tensor.dtype, device="cpu")
        if storage is None:
            copy = copy.new_empty(tensor.shape)
        else:
            copy.set_(storage[begin : begin + tensor.nbytes], 0, tensor.shape)  # type: ignore[call-overload]
        copies.append(copy.copy_(tensor.detach()))
        begin += _rounded(tensor.nbytes)
    return copies


def _region(size: int, device: torch.device) -> torch.UntypedStorage:
    """Fresh registered memory, which ends with the last tensor on it."""
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if sys.platform == "win32":
        block = mmap.mmap(-1, length)
    else:
        block = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    window = (ctypes.c_char * length).from_buffer(block)
    address = ctypes.addressof(window)
    if register(address, length):
        # The window holds the memory, so this runs before it is given back.
        weakref.finalize(window, unregister, address, device).atexit = False
    return torch.frombuffer(window, dtype=torch.uint8).untyped_storage()


def register(address: int, size: int) -> bool:
    """Lock whole pages and make them known to CUDA; False, with a warning, where it takes no more."""
    code = torch.cuda.cudart().cudaHostRegister(address, size, 0)
    if int(code) == 0:
        return True
    logger.warning(
        "CUDA registers no more memory (error %d): weights on the CPU are read by the GPU more slowly; allow more "
        "locked memory (ulimit -l), or give the CPU less of the model with max_memory",
        int(code),
    )
    return False


def unregister(address: int, device: torch.device) -> None:
    """Undo `register`, once ``device`` has taken all that was to be read from there."""
    torch.cuda.synchronize(device)  # it may be reading still
    torch.cuda.cudart().cudaHostUnregister(address)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
