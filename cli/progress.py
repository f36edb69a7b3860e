"""How far a command is that goes through a checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ..loading.report import human
from .output import Output

_PAUSE = 0.2  # seconds between two changes of the line


def progress(doing: str) -> Callable[[int, int], None]:
    """A function of bytes done and in total; it keeps a line on standard error, where that is a terminal."""
    output, last = Output(sys.stderr), 0.0

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if output.terminal and (now - last > _PAUSE or done >= total):
            last = now
            output.progress(f"{doing}: {human(done)} of {human(total)}", last=done >= total)

    return show
