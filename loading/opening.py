"""Opening files that strangers may have put there: regular ones only, never waiting for a pipe."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import NotFoundError, PathError

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe must not block us


def open_file(path: Path) -> tuple[BinaryIO, os.stat_result]:
    """The file, open for reading without a buffer, and its state.

    Raises NotFoundError, or PathError for a directory, pipe, socket or device, and for what the system refuses.
    """
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)  # before opening: opening a device can do things
        descriptor = os.open(path, _FLAGS) if regular else -1
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file: {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise PathError(f"cannot open {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if regular:
        handle = cast(BinaryIO, open(descriptor, "rb", buffering=0))  # noqa: SIM115  the caller closes it
        info = os.fstat(descriptor)
        if stat.S_ISREG(info.st_mode):
            return handle, info
        handle.close()
    raise PathError(f"{path} is not a regular file; a checkpoint holds regular files only")
