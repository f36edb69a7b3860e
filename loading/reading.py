"""Bytes of a checkpoint's files read into memory that is there: no mapping that could fail under the reader's hands.

A file that is shorter or another than when its header was read, and a disk that fails, are errors here; where a file
is mapped, both would be a SIGBUS. On request, whole pages that are not in the page cache are read past it (O_DIRECT):
the disk writes into the tensor itself, at its own speed whatever the processors do, and other programs keep theirs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import IntegrityError, ReadError
from .arena import PAGE
from .checkpoint import Checkpoint
from .header import FileStamp

AHEAD = 64 << 20  # bytes in front of the reader that the disk is asked for
_STRIDE = 8 << 20  # bytes it is asked for at a time
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_CACHESTAT = 451  # the number of that system call, on every processor
DIRECT_LEAST = 1 << 20  # bytes from which on a read past the page cache is worth its two ends
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT)  # the last: memory that a disk cannot write into


class Reader:
    """Files of one checkpoint, opened when first read; used by several threads.

    ``direct``: what is not in the page cache is read past it, where the system can.
    """

    def __init__(self, checkpoint: Checkpoint, *, direct: bool = False) -> None:
        self.direct = direct and _DIRECT != 0 and _NOWAIT != 0
        self._open: dict[tuple[Path, int], int] = {}
        self._refused: set[Path] = set()  # files whose file system does not read past the page cache
        self._lock = threading.Lock()
        self._wait = checkpoint.wait
        self._stamps = checkpoint.stamps
        self._asked: dict[Path, int] = {}

    def close(self) -> None:
        """Close all files; they are opened again if need be."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # an interrupt may come anywhere
            self.close()

    def into(self, target: torch.Tensor, file: Path, begin: int) -> None:
        """Fill a contiguous CPU tensor with the file's bytes from ``begin`` on.

        Raises IntegrityError if the file is not the one whose header was read, or ends before the tensor does, and
        ReadError if the system cannot read it.
        """
        view, position = octets_of(target), 0
        if self.past_cache(file, begin, len(view)) and (target.data_ptr() - begin) % PAGE == 0:
            lead = -begin % PAGE
            end = lead + (len(view) - lead) // PAGE * PAGE
            self._through_cache(view[:lead], file, begin)
            position = lead + self._past_cache(view[lead:end], file, begin + lead)
        self._through_cache(view[position:], file, begin + position)

    def past_cache(self, file: Path, begin: int, size: int) -> bool:
        """Whether so many bytes are best read past the page cache, into memory that lies in its page as in the file."""
        if not self.direct or size < DIRECT_LEAST or file in self._refused:
            return False
        return not _resident(self._descriptor(file), begin + size // 2)

    def _through_cache(self, view: memoryview, file: Path, begin: int) -> None:
        descriptor, position = self._descriptor(file), 0
        while position < len(view):
            try:
                count = _read(descriptor, view[position:], begin + position, self._lock)
            except OSError as error:
                raise failed(file, error) from error
            if count == 0:
                raise IntegrityError(
                    f"{file} ends at byte {begin + position}, its header promises more; it was cut while it was read. "
                    "Fetch it again, or load when nothing writes there"
                )
            position += count

    def _past_cache(self, view: memoryview, file: Path, begin: int) -> int:
        """Whole pages, as many as come; the bytes read, fewer where the file ends or the system refuses."""
        position = 0
        while position < len(view):
            try:
                count = _read(self._descriptor(file, _DIRECT), view[position:], begin + position, self._lock)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise failed(file, error) from error
                self._refused.add(file)
                return position
            position += count
            if count % PAGE or not count:
                break
        return position

    def ahead(self, file: Path, begin: int, end: int) -> None:
        """Tell the system that ``begin`` to ``end`` is needed soon; only what is not in memory costs anything."""
        if not hasattr(os, "posix_fadvise") or (self.direct and file not in self._refused):
            return  # in the latter case it need not come into the page cache
        start = max(begin, self._asked.get(file, 0))
        if start >= end:
            return
        descriptor = self._descriptor(file)
        while start < end:
            if not _resident(descriptor, start):
                with suppress(OSError):
                    os.posix_fadvise(descriptor, start, _STRIDE, os.POSIX_FADV_WILLNEED)
            start += _STRIDE
        self._asked[file] = start

    def _descriptor(self, file: Path, flags: int = 0) -> int:
        descriptor = self._open.get((file, flags))
        if descriptor is not None:
            return descriptor
        self._wait(file)
        with self._lock:
            if (file, flags) not in self._open:
                self._open[file, flags] = self._opened(file, flags)
            return self._open[file, flags]

    def _opened(self, file: Path, flags: int) -> int:
        flags |= os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            descriptor = os.open(file, flags)
        except FileNotFoundError as error:
            raise IntegrityError(f"{file} is gone since its header was read; load again") from error
        except OSError as error:
            if flags & _DIRECT and error.errno in _REFUSED:
                raise
            raise failed(file, error) from error
        try:
            if FileStamp.of(os.fstat(descriptor)) != self._stamps[file]:
                raise IntegrityError(
                    f"{file} is not what it was when its header was read; load again when nothing writes there "
                    "(saving beside it and renaming is safe)"
                )
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):  # a file system without it
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def failed(file: Path, error: OSError) -> ReadError:
    """The error for a file that the system cannot read, with the system's error number."""
    told = ReadError(f"{file} cannot be read: {error.strerror or error}; is the disk, or the network to it, in order?")
    told.errno, told.filename = error.errno, str(file)
    return told


def octets_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which must outlive the view."""
    if not tensor.nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def placed(room: torch.Tensor, begin: int, size: int) -> torch.Tensor:
    """``size`` bytes of ``room``, which has a page more: those that lie in a page as the file's from ``begin`` on."""
    place = (begin - room.data_ptr()) % PAGE
    return room[place : place + size]


def _read(descriptor: int, view: memoryview, begin: int, lock: threading.Lock) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], begin)
    with lock:  # pragma: no cover - systems whose files have one position only
        os.lseek(descriptor, begin, os.SEEK_SET)
        raw = os.read(descriptor, min(len(view), _STRIDE))
    view[: len(raw)] = raw
    return len(raw)


def _resident(descriptor: int, begin: int) -> bool:
    """Whether the byte at ``begin`` is in the page cache, as far as the system tells.

    By ``cachestat`` (Linux 6.5, of files that this user may write), else by a read that must not wait. Such a read may
    bring in what lies around the byte.
    """
    if (call := _system_call()) is not None:
        where, found = (ctypes.c_uint64 * 2)(begin, 1), (ctypes.c_uint64 * 5)()
        if call(_CACHESTAT, descriptor, where, found, 0) == 0:
            return found[0] > 0
    if not _NOWAIT or not hasattr(os, "preadv"):
        return False
    try:
        os.preadv(descriptor, [bytearray(1)], begin, _NOWAIT)
    except OSError:  # it would have to wait, or cannot tell
        return False
    return True


@lru_cache(maxsize=1)
def _system_call() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    call.restype = ctypes.c_long
    return call
