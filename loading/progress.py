"""A progress bar for loads that take long enough to want one."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PATIENCE = 1.0  # seconds before a bar is worth its flicker
LARGE = 512 << 20  # bytes


class Progress:
    """Counts bytes; shows a tqdm bar if the work is large, takes longer than a second, and stderr is a terminal.

    ``wanted=True`` shows it at once and always, ``False`` never.
    """

    def __init__(self, total: int, wanted: bool | None, what: str) -> None:
        self._total, self._what = total, what
        self._wanted = wanted
        self._maybe = wanted is None and total > LARGE and _is_terminal()
        self._started, self._done, self._bar = time.monotonic(), 0, None
        if wanted and total:
            self._show()

    def __call__(self, count: int) -> None:
        self._done += count
        bar = self._bar
        if bar is not None:
            bar.update(count)
        elif self._maybe and time.monotonic() - self._started > PATIENCE:
            self._show()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def watching(self) -> bool:
        """Whether calling it can have any effect."""
        return bool(self._wanted) or self._maybe

    def _show(self) -> None:
        from tqdm.auto import tqdm

        self._maybe = False
        bar: Any = tqdm(
            total=self._total, initial=self._done, desc=f"Loading {self._what}", unit="B", unit_scale=True, leave=False
        )
        self._bar = bar


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # no stderr, or a closed one
        return False
