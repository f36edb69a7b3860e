"""Weights that stay in their files: private mappings of any size, and pages given back once they were used.

A private mapping is memory that the file backs: it costs what is touched, the system can take it back at any time, and
what is written to it becomes memory of this process; the file never changes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from .arena import DONTNEED, PAGE, WILLNEED, advise_range

# The system else refuses a writable mapping larger than its memory, as if all of it might be written to. Python has
# had the name since 3.13; on other processors than these the number differs, and they do without.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_PROCESSORS = ("x86_64", "aarch64")
_OF_FILE, _SWAPPED = 61, 62  # bits of /proc/self/pagemap; see the kernel's admin-guide/mm/pagemap
_ENTRY = 8


def map_file(path: str | os.PathLike[str], size: int) -> torch.UntypedStorage:
    """The first ``size`` bytes of a file as a storage that is a private mapping; nothing is read.

    Raises OSError or RuntimeError, as the system says, if the file cannot be mapped or is shorter than that.
    """
    if not _own_way():
        return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(os.fspath(path), False, size))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        held = os.fstat(descriptor).st_size
        if held < size:  # reading beyond its end would end the process
            raise OSError(f"{path} has {held} bytes, not {size}")
        address = _call("mmap")(
            None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _NORESERVE, descriptor, 0
        )
        if address in (None, ctypes.c_void_p(-1).value):
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} for a mapping of {size} bytes", os.fspath(path))
    finally:
        os.close(descriptor)
    window = (ctypes.c_char * size).from_address(address)
    weakref.finalize(window, _call("munmap"), address, size).atexit = False
    return torch.frombuffer(window, dtype=torch.uint8).untyped_storage()


def _own_way() -> bool:
    return sys.platform.startswith("linux") and os.uname().machine in _PROCESSORS and sys.maxsize > 1 << 32


@lru_cache(maxsize=2)
def _call(name: str) -> Any:
    call = getattr(ctypes.CDLL(None, use_errno=True), name)
    if name == "mmap":
        call.restype = ctypes.c_void_p
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    else:
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return call


def give_back(tensors: Iterable[torch.Tensor]) -> int:
    """Let go of the pages under contiguous CPU tensors that are still as their file has them; the bytes looked at.

    The pages are read from the file again when they are next used. A tensor of which any page was written to stays as
    it is, as does everything where the system does not say which pages were.
    """
    looked = 0
    pages = _pagemap()
    if pages < 0:
        return 0
    for run in _runs(tensors):
        whole = (run[0][0], run[-1][1])
        # Neighbours in a file are looked at together; if any was written to, one by one.
        clean = [whole] if _clean(pages, whole) else [part for part in run if len(run) > 1 and _clean(pages, part)]
        for begin, end in clean:
            advise_range(-(-begin // PAGE) * PAGE, end // PAGE * PAGE, DONTNEED)
            looked += end - begin
    return looked


def ask_for(tensors: Iterable[torch.Tensor]) -> None:
    """Let the system begin to read the pages under mapped tensors that are not in its memory."""
    for run in _runs(tensors):
        advise_range(run[0][0] // PAGE * PAGE, -(-run[-1][1] // PAGE) * PAGE, WILLNEED)


def _runs(tensors: Iterable[torch.Tensor]) -> list[list[tuple[int, int]]]:
    """The addresses of tensors, those together that leave less than a page between them."""
    ranges = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.nbytes]
    runs: list[list[tuple[int, int]]] = []
    for begin, end in sorted(set(ranges)):
        if runs and begin - runs[-1][-1][1] < PAGE:
            runs[-1].append((begin, end))
        else:
            runs.append([(begin, end)])
    return runs


def _clean(pages: int, within: tuple[int, int]) -> bool:
    """Whether all pages in memory are the file's own: none was copied for writing, none swapped out."""
    first = -(-within[0] // PAGE)
    count = within[1] // PAGE - first
    if count <= 0:
        return False
    try:
        raw = os.pread(pages, count * _ENTRY, first * _ENTRY)
    except OSError:
        return False
    if len(raw) != count * _ENTRY:
        return False
    flags = torch.frombuffer(bytearray(raw), dtype=torch.int64)
    copied = (flags < 0) & ((flags >> _OF_FILE) & 1 == 0)  # the highest bit, the sign, says that the page is in memory
    return not bool((copied | ((flags >> _SWAPPED) & 1 == 1)).any())


_opened: dict[int, int] = {}


def _pagemap() -> int:
    """A descriptor of this process's page table, -1 where there is none; after a fork the child opens its own."""
    process = os.getpid()
    if process not in _opened:
        _opened.clear()
        try:
            _opened[process] = os.open(Path("/proc/self/pagemap"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            _opened[process] = -1
    return _opened[process]
