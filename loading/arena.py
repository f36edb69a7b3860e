"""CPU memory for weights that are computed while loading: huge pages, given back tensor by tensor.

Most of the cost of fresh memory is the page faults. Anonymous mappings with MADV_HUGEPAGE take one fault for 2 MiB
instead of 512. Each large tensor has its own mapping, so replacing one weight gives its memory back at once.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch

from ..errors import MemoryLimitError
from .memory import check_memory

HUGE = 2 << 20
ALIGNMENT = 64
PAGE = mmap.PAGESIZE
_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
NOHUGEPAGE = getattr(mmap, "MADV_NOHUGEPAGE", 15)
WILLNEED = getattr(mmap, "MADV_WILLNEED", 3)
DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)
POPULATE_READ, POPULATE_WRITE = 22, 23  # Linux 5.14; unknown to Python's mmap
FAULT = (errno.EFAULT, 133)  # what POPULATE_READ says of pages whose touch would be a SIGBUS; 133 is EHWPOISON


def allocate(
    wanted: Sequence[tuple[torch.Size | tuple[int, ...], torch.dtype]], starts: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """Uninitialised (zero, not yet backed by memory) contiguous CPU tensors of the given shapes and dtypes.

    Tensors of 2 MiB and more start at a 2 MiB boundary in a mapping of their own, or as many bytes behind it as
    ``starts`` says, less than a page; smaller ones share one mapping. Each has a storage of exactly its own bytes.
    Raises MemoryLimitError if there is not enough memory.
    """
    sizes = [_nbytes(shape, dtype) for shape, dtype in wanted]
    check_memory(sum(sizes), "casting or copying the bytes of weights")
    small = sum(_rounded(size) for size in sizes if size < HUGE)
    pool, position = _map(small) if small else None, 0
    tensors = []
    for number, ((shape, dtype), size) in enumerate(zip(wanted, sizes, strict=True)):
        if size == 0:
            tensors.append(torch.empty(tuple(shape), dtype=dtype, device="cpu"))
        elif size < HUGE:
            tensors.append(_tensor(pool, position, shape, dtype, size))
            position += _rounded(size)
        else:
            shift = starts[number] if starts is not None else 0
            mapping = _map(size + shift + HUGE)
            start = -_address(mapping) % HUGE
            if _HUGEPAGE is not None:
                with suppress(OSError):  # a kernel without huge pages: small ones will do
                    mapping.madvise(_HUGEPAGE, start, (size + shift) // HUGE * HUGE)
            tensors.append(_tensor(mapping, start + shift, shape, dtype, size))
    return tensors


def advise(tensor: torch.Tensor, advice: int, *, inside: bool) -> int:
    """madvise the pages of a contiguous CPU tensor: those it has to itself (``inside``), or all it touches.

    Other threads run meanwhile. Returns the system's error number, 0 if there is none; it can mostly be ignored, as
    advice changes no result.
    """
    start = tensor.data_ptr()
    end = start + tensor.nbytes
    if inside:
        start, end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
    else:
        start = start // PAGE * PAGE
    return advise_range(start, end, advice)


def advise_range(start: int, end: int, advice: int) -> int:
    """madvise the pages from one address to another, both at the border of a page; as `advise`."""
    call = _madvise()
    if call is not None and end > start and call(start, end - start, advice):
        return ctypes.get_errno()
    return 0


class Populator:
    """Backs memory of ``allocate`` piece by piece, just before it is written; used by several threads.

    Huge pages are given up where they are slow to come by. That is so in virtual machines that give free memory back
    to their host: it takes only large free blocks, so huge pages always come from the host, at its pace, while small
    pages are still there. Time of this thread's own is measured, since waiting for a processor says nothing; of one
    call in four, since asking for that time is slow itself.
    """

    SLOW = 2e-3  # seconds for 2 MiB; 0.1 to 0.5 ms are usual
    TRIALS = 8
    EVERY = 4

    def __init__(self) -> None:
        self.small_pages = False
        self._calls, self._tried, self._spent = 0, 0, 0.0

    def __call__(self, tensor: torch.Tensor) -> None:
        if self.small_pages:
            advise(tensor, NOHUGEPAGE, inside=True)
            advise(tensor, POPULATE_WRITE, inside=False)
        elif tensor.nbytes < HUGE or self._untimed():
            advise(tensor, POPULATE_WRITE, inside=False)
        else:
            began = time.thread_time()
            advise(tensor, POPULATE_WRITE, inside=False)
            self._spent += time.thread_time() - began
            self._tried += tensor.nbytes // HUGE
            if self._tried >= self.TRIALS:
                self.small_pages = self._spent > self._tried * self.SLOW
                self._tried, self._spent = 0, 0.0

    def _untimed(self) -> bool:
        self._calls += 1
        return self._calls > self.TRIALS and self._calls % self.EVERY != 0


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    call.restype = ctypes.c_int
    return call


def _map(size: int) -> mmap.mmap:
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, size)
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryLimitError(f"no memory for {size} bytes of weights: {error}") from error


def _address(mapping: mmap.mmap) -> int:
    return torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()


def _tensor(
    mapping: mmap.mmap | None, start: int, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, size: int
) -> torch.Tensor:
    assert mapping is not None
    return torch.frombuffer(mapping, dtype=dtype, count=size // dtype.itemsize, offset=start).view(tuple(shape))


def _nbytes(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
