"""Opening what must be a regular file: never a pipe that blocks, never a device."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FormatError, NotFoundError, PathError
from .header import FileStamp

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class RegularFile:
    """An open file, its ``size`` and ``stamp``; ``read`` gives exactly what is asked for."""

    def __init__(self, path: Path, descriptor: int, stamp: FileStamp) -> None:
        self.path, self.stamp, self.size = path, stamp, stamp.size
        self._descriptor = descriptor

    def read(self, begin: int, count: int) -> bytes:
        """``count`` bytes at ``begin``; FormatError if the file does not have them."""
        if begin < 0 or count < 0 or begin + count > self.size:
            raise FormatError(
                f"{self.path} is truncated or damaged: bytes {begin} to {begin + count} are named, the file has "
                f"{self.size}; fetch it again"
            )
        parts = []
        while count:
            os.lseek(self._descriptor, begin, os.SEEK_SET)
            part = os.read(self._descriptor, count)
            if not part:
                raise FormatError(f"{self.path} ended while it was read; is it being written?")
            parts.append(part)
            begin, count = begin + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def open_regular(path: Path) -> Iterator[RegularFile]:
    """Open a file to read from anywhere in it. Raises NotFoundError, or PathError if it is no regular file."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)  # before opening: opening a device can do things
        descriptor = os.open(path, _FLAGS) if regular else -1
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PathError(f"cannot open {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if not regular:
        raise PathError(f"{path} is not a regular file; a weights file must be one")
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise PathError(f"{path} is not a regular file; a weights file must be one")
        yield RegularFile(path, descriptor, FileStamp.of(info))
    finally:
        os.close(descriptor)
