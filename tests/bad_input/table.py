"""The tables of docs/bad_input.md that follow from tables of tests: ``python tests/bad_input/table.py`` writes them.

In the document a comment ``<!-- rows of FILE::TEST, guaranteed: X Y -->`` stands before each such table.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))
DOCUMENT = ROOT / "docs" / "bad_input.md"
HEAD = "| input | error | message | guaranteed | test |\n|---|---|---|---|---|\n"
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
FAULTS = ROOT / "benchmarks" / "results" / "faults.json"
_COUNTS = ("inputs", "accepted", "refused", "corpus", "arcs", "faults", "lost", "run")
_BROKEN = re.compile(r"(<!-- the counts of benchmarks/results/faults\.json -->\n)(?:.+\n)*")
_RUN = re.compile(r"(<!-- the run of benchmarks/results/fuzz\.json -->\n)[^#]*\Z")
_MARK = re.compile(r"(<!-- rows of (\S+)::(\w+), guaranteed: ([A-Z ]+) -->\n)(?:\|.*\n)*")


def rows_of(file: str, test: str) -> Iterator[tuple[str, str, str, str]]:
    """(input, error, message, id) for each case of a parametrized test, from the values it is given."""
    function = getattr(importlib.import_module(f"bad_input.{Path(file).stem}"), test)
    (mark,) = (mark for mark in function.pytestmark if mark.name == "parametrize")
    home = sys.modules[function.__module__]
    for given in mark.args[1]:
        identity, value = (given, None) if isinstance(given, str) else (given.id, given.values[0])
        if value is None:
            table = next(t for t in vars(home).values() if isinstance(t, dict) and t is mark.args[1])
            value = table[given]
        error, words = _told(value)
        yield identity, error, ", ".join(f"“{_plain(word)}”" for word in words if word), identity


def _told(value: Any) -> tuple[str, list[str]]:
    """The error and the words of a case, in whichever form a table holds it."""
    if hasattr(value, "error"):
        return value.error.__name__, list(value.words)
    if isinstance(value, dict):
        return "none", ["the right model; what the file may not ask for is not done"]
    error = next((part for part in value if isinstance(part, type)), None)
    words = [part for part in value if isinstance(part, str)] if len(value) > 2 or error is None else []
    if error is None:
        return ("a warning" if any(words) else "none"), words if any(words) else ["the right model"]
    return error.__name__, words if words else ["the name"]


def _plain(text: str) -> str:
    """The text as a cell of a table can hold it."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return shown.replace("|", "\\|").replace("<", "&lt;")


def renewed(text: str) -> str:
    """The document with its tables as the tests have them."""

    def fill(found: re.Match[str]) -> str:
        mark, file, test, promises = found.groups()
        lines = [
            f"| {_plain(given)} | {error} | {message} | {promises} | `[{_plain(identity)}]` |\n"
            for given, error, message, identity in rows_of(file, test)
        ]
        return mark + HEAD + "".join(lines)

    text = _BROKEN.sub(lambda found: found[1] + _injected(), _MARK.sub(fill, text))
    return _RUN.sub(lambda found: found[1] + _recorded(), text)


def _injected() -> str:
    """The recorded count of faults in a sentence."""
    if not FAULTS.exists():
        return ""
    result = json.loads(FAULTS.read_text(encoding="utf-8"))
    counts = dict.fromkeys(("kill", "full", "Hub"), 0)
    for row in result["rows"]:
        counts[next(kind for kind in counts if row["row"].endswith(kind))] += row["injected"]
    total = result["total"]
    return (
        f"{total['injected']} faults: {counts['kill']} times kill -9 and {counts['full']} times a full disk, each at\n"
        f"another step of a save; {counts['Hub']} wrong answers of the Hub. Lost, mixed or left: {total['lost']}.\n"
        f"Commit {result['commit']}, {result['date'][:10]}.\n"
    )


def _recorded() -> str:
    """The fuzzer's recorded run as a table."""
    if not RESULTS.exists():
        return ""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [*result["rows"], {"row": "all", **result["total"]}]
    lines = ["| target | " + " | ".join(_COUNTS) + " |", "|---" * (len(_COUNTS) + 1) + "|"]
    for row in rows:
        counts = [f"{row[name]:,}".replace(",", " ") if name in row else "" for name in _COUNTS]
        lines.append(f"| {row['row']} | " + " | ".join(counts) + " |")
    place = f"{result['machine']['cpu']}, Python {result['python']}, torch {result['versions']['torch']}"
    about = (
        f"Seed {result['seed']}, commit {result['commit']}, {result['date'][:10]}, {place}. Accepted: what is right."
    )
    return "\n".join(["", about, "", *lines]) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
