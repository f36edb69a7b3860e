"""Reading anywhere in what must be a regular file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FormatError
from .header import FileStamp
from .opening import open_file


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
    handle, info = open_file(path)
    with handle:
        yield RegularFile(path, handle.fileno(), FileStamp.of(info))
