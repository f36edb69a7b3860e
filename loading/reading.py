"""Bytes of a checkpoint's files read into memory that is there: no mapping that could fail under the reader's hands.

A file that is shorter or another than when its header was read, and a disk that fails, are errors here; where a file
is mapped, both would be a SIGBUS.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import IntegrityError, ReadError
from .checkpoint import Checkpoint
from .header import FileStamp

AHEAD = 64 << 20  # bytes in front of the reader that the disk is asked for
_STRIDE = 8 << 20  # bytes it is asked for at a time
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)


class Reader:
    """Files of one checkpoint, opened when first read; used by several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._open: dict[Path, int] = {}
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
        view = octets_of(target)
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

    def ahead(self, file: Path, begin: int, end: int) -> None:
        """Tell the system that ``begin`` to ``end`` is needed soon; only what is not in memory costs anything."""
        if not hasattr(os, "posix_fadvise"):
            return
        start = max(begin, self._asked.get(file, 0))
        if start >= end:
            return
        descriptor, probe = self._descriptor(file), bytearray(1)
        while start < end:
            if not _resident(descriptor, probe, start):
                with suppress(OSError):
                    os.posix_fadvise(descriptor, start, _STRIDE, os.POSIX_FADV_WILLNEED)
            start += _STRIDE
        self._asked[file] = start

    def _descriptor(self, file: Path) -> int:
        descriptor = self._open.get(file)
        if descriptor is not None:
            return descriptor
        self._wait(file)
        with self._lock:
            if file not in self._open:
                self._open[file] = self._opened(file)
            return self._open[file]

    def _opened(self, file: Path) -> int:
        try:
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError as error:
            raise IntegrityError(f"{file} is gone since its header was read; load again") from error
        except OSError as error:
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


def _read(descriptor: int, view: memoryview, begin: int, lock: threading.Lock) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], begin)
    with lock:  # pragma: no cover - systems whose files have one position only
        os.lseek(descriptor, begin, os.SEEK_SET)
        raw = os.read(descriptor, min(len(view), _STRIDE))
    view[: len(raw)] = raw
    return len(raw)


def _resident(descriptor: int, probe: Any, begin: int) -> bool:
    """Whether the byte at ``begin`` is in the page cache, as far as the system tells without reading it."""
    if not _NOWAIT or not hasattr(os, "preadv"):
        return False
    try:
        os.preadv(descriptor, [probe], begin, _NOWAIT)
    except OSError:  # it would have to wait, or cannot tell
        return False
    return True
