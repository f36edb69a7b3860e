"""What the commands print, with rich where it is installed and the output is a terminal, plainly elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, TextIO

_CONTROLS = {code: 0xFFFD for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_BARS = "▁▂▃▄▅▆▇█"


class Output:
    """Prints headings, fields, tables and running text to one stream (standard output unless given).

    On a terminal, control characters become U+FFFD: names in files and generated text may hold escape sequences.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.terminal = self.stream.isatty() or bool(os.environ.get("FORCE_COLOR"))
        self._console = self._rich() if self.terminal and not os.environ.get("NO_COLOR") else None

    def _rich(self) -> Any:
        try:
            from rich.console import Console
        except ImportError:
            return None
        return Console(file=self.stream, highlight=False, soft_wrap=True)

    @property
    def rich(self) -> bool:
        """Whether rich does the printing."""
        return self._console is not None

    def write(self, text: str, style: str = "", end: str = "") -> None:
        """Running text as it is, without a line break of its own."""
        text = text.translate(_CONTROLS) if self.terminal else text
        if self._console is not None and style:
            self._console.print(text, style=style, end=end, markup=False, emoji=False)
        else:
            self.stream.write(text + end)
        self.stream.flush()

    def line(self, text: str = "", style: str = "") -> None:
        """One line."""
        self.write(text, style, end="\n")

    def heading(self, text: str) -> None:
        """A line that begins a section."""
        self.line()
        self.line(text, "bold cyan")

    def fields(self, rows: Iterable[tuple[str, str]]) -> None:
        """Labels and values, aligned."""
        rows = list(rows)
        width = max((len(label) for label, _ in rows), default=0)
        for label, value in rows:
            self.write(f"  {label:<{width}}  ", "dim")
            self.line(value)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under a line of headings."""
        widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
        self.line("  ".join(f"{name:<{width}}" for name, width in zip(columns, widths, strict=True)).rstrip(), "bold")
        for row in rows:
            self.line("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())

    def progress(self, text: str, *, last: bool = False) -> None:
        """A line that the next one overwrites, on a terminal; elsewhere only the last is printed."""
        if self.terminal:
            self.stream.write("\r\x1b[2K" + text.translate(_CONTROLS) + ("\n" if last else ""))
            self.stream.flush()
        elif last:
            self.line(text)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Values as a row of bars, averaged down to ``width``; empty for none."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def listed(files: Sequence[str], most: int = 12) -> str:
    """Names of files in one line, shortened."""
    return ", ".join(files if len(files) <= most else [f"{len(files)} in all", files[0], "..."])


def count(number: int) -> str:
    """``1_179_360`` → ``"1.18 M"``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
