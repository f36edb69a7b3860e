"""Races: the same work done by two sides in alternating fresh processes, ratios pair by pair, results as JSON and PNG.

A benchmark module defines ``measure(side, work) -> dict of figures``, which runs in a process of its own, and calls
`race` or `race_all` for each row. The figures of a row are medians over the rounds; a ratio is the median of the
rounds' ratios, with the smallest and largest beside it. A figure may be something else than a number, of which no ratio
is taken: a text that says why a side has none, or a curve.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("LOADSTONE_BENCH_RESULTS") or ROOT / "benchmarks" / "results")
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "triton", "bitsandbytes", "peft",
            "fastsafetensors", "runai-model-streamer")  # fmt: skip
_POPULATE_WRITE = 23  # Linux 5.14
Measure = Callable[[str, dict[str, Any]], dict[str, Any]]


class PrivateMemory:
    """Peak of this process's private (anonymous) memory in MB, sampled fifty times a second, so that the
    sampling does not slow what is timed; Linux only."""

    def __enter__(self) -> PrivateMemory:
        self.peak = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self.now())

    @staticmethod
    def now() -> float:
        """Private memory at this moment, MB."""
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024 / 1e6
        return float("nan")


class DeviceMemory:
    """Peak of what torch holds for tensors on the current GPU, MB."""

    def __enter__(self) -> DeviceMemory:
        importlib.import_module("torch").cuda.reset_peak_memory_stats()
        self.peak = self.now()
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = importlib.import_module("torch").cuda.max_memory_allocated() / 1e6

    @staticmethod
    def now() -> float:
        """Memory of the tensors at this moment, MB."""
        return importlib.import_module("torch").cuda.memory_allocated() / 1e6


def memory_on(device: str) -> DeviceMemory | PrivateMemory:
    """What watches the memory of work on "cuda" or on "cpu"."""
    return DeviceMemory() if device == "cuda" else PrivateMemory()


def warm_memory(gigabytes: float) -> None:
    """Touch fresh memory and give it back, so that a timing does not pay for what this machine last did with it.

    Virtual machines hand free memory to their host; taking it back can cost seconds, to whichever side comes first.
    """
    size = int(gigabytes * 1e9)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.madvise(_POPULATE_WRITE)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that one call took, and what it returned."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def race(
    module: str,
    name: str,
    work: dict[str, Any],
    *,
    rounds: int,
    uncounted: int = 1,
    sides: tuple[str, str] = ("loadstone", "transformers"),
) -> dict[str, Any]:
    """Run both sides in turn, ``rounds`` times after ``uncounted`` rounds to warm up; one row of results."""
    row = race_all(module, name, work, rounds=rounds, uncounted=uncounted, sides=sides)[0]
    row.pop("peer")
    return row


def race_all(
    module: str, name: str, work: dict[str, Any], *, rounds: int, sides: Sequence[str], uncounted: int = 1
) -> list[dict[str, Any]]:
    """`race` of the first side against each of the others, all in turn; a row for each of them, its "peer".

    A side that has nobody to race gets a row all the same, whose peer is None.
    """
    _compile_sources()
    seen: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(rounds + uncounted):
        for side in sides if turn % 2 else sides[::-1]:
            figures = _child(module, side, work)
            if turn >= uncounted:
                seen[side].append(figures)
    rows = []
    for peer in sides[1:] or (None,):
        both = sides[:1] if peer is None else (sides[0], peer)
        row: dict[str, Any] = {"row": name, "peer": peer, "work": work, "rounds": rounds}
        row |= {"commit": commit(), "date": now()}
        for figure in seen[sides[0]][0]:
            row[figure] = summarized({side: [figures[figure] for figures in seen[side]] for side in both})
        print_row(row, both)
        rows.append(row)
    return rows


def summarized(seen: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """One figure of all rounds: `compared` for numbers of two sides, else what each side has; no number: its last."""
    numbers = {side: all(isinstance(value, (int, float)) for value in values) for side, values in seen.items()}
    if len(seen) == 2 and all(numbers.values()):
        first, second = seen
        return compared(list(zip(seen[first], seen[second], strict=True)), (first, second))
    return {side: statistics.median(values) if numbers[side] else values[-1] for side, values in seen.items()}


def compared(pairs: Sequence[tuple[float, float]], sides: tuple[str, str]) -> dict[str, Any]:
    """Both sides' medians, the median ratio of the pairs (peer / ours), and its smallest and largest."""
    ratios = sorted(theirs / ours for ours, theirs in pairs if ours)
    return {
        sides[0]: statistics.median(ours for ours, _ in pairs),
        sides[1]: statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": [ratios[0], ratios[-1]] if ratios else None,
    }


@lru_cache(maxsize=1)
def _compile_sources() -> None:
    """Byte-compile loadstone, as pip does for what it installs: an editable install may never have been."""
    for folder in ("cli", "kernels", "loading", "models", "quant", "registry"):
        compileall.compile_dir(ROOT / folder, quiet=2)
    compileall.compile_dir(ROOT, maxlevels=0, quiet=2)


def _child(module: str, side: str, work: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, "--child", side, json.dumps(work)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} failed for {side} on {work}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_row(row: dict[str, Any], sides: Sequence[str]) -> None:
    """A row for the reader of the terminal."""
    print(row["row"], flush=True)
    for figure, value in row.items():
        if isinstance(value, dict) and "ratio" in value:
            low, high = value["spread"] or (0, 0)
            print(
                f"    {figure:<28} {sides[0]} {value[sides[0]]:10.4f}   {sides[1]} {value[sides[1]]:10.4f}   "
                f"ratio {value['ratio'] or 0:7.2f}  ({low:.2f} to {high:.2f})",
                flush=True,
            )
        elif isinstance(value, dict) and set(value) == set(sides):
            print(f"    {figure:<28} " + "   ".join(f"{side} {_told(value[side])}" for side in sides), flush=True)


def _told(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_told, value))
    return value if isinstance(value, str) else f"{value:10.4f}"


def environment() -> dict[str, Any]:
    """The machine, versions, date and commit that a result belongs to."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return {
        "date": now(),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        },
    }


def missing(packages: Iterable[str]) -> dict[str, str]:
    """{package: that it is not installed}, of those that are not."""
    return {package: f"{package} is not installed" for package in packages if util.find_spec(package) is None}


def commit() -> str:
    """The commit that is being measured, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
        )
    except OSError:  # a machine without git
        return "unknown"


def now() -> str:
    """The time, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _cpu() -> str:
    with open("/proc/cpuinfo") as info:
        return next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())


def write(
    name: str,
    rows: list[dict[str, Any]],
    *,
    merge: bool = False,
    about: dict[str, Any] | None = None,
    chart: Callable[[Path, list[dict[str, Any]]], None] | None = None,
) -> Path:
    """Write ``<name>.json`` into the folder of results ($LOADSTONE_BENCH_RESULTS, default ``benchmarks/results``), and
    beside it ``<name>.png`` if matplotlib is there: a bar chart of the ratios, or what ``chart`` draws.

    merge: replace rows of the same name and peer in what is there, and leave the others; each row has its own date and
    commit. about: more to say about the whole, as of the machine.
    """
    path, rows = save(name, rows, merge=merge, about=about)
    if util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no chart")
    else:
        (chart or bars)(RESULTS / f"{name}.png", rows)
    print(f"written to {path}")
    return path


def save(
    name: str, rows: list[dict[str, Any]], *, merge: bool = False, about: dict[str, Any] | None = None
) -> tuple[Path, list[dict[str, Any]]]:
    """The JSON of `write` alone, for long runs that may be cut off; the file's path, and all rows that are in it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {"benchmark": name, **environment(), **(about or {}), "rows": rows}
    if merge and path.exists():
        result = json.loads(path.read_text())
        renewed = {(row["row"], row.get("peer")): row for row in rows}
        kept = [renewed.pop((row["row"], row.get("peer")), row) for row in result["rows"]]
        result["rows"] = rows = kept + list(renewed.values())
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path, rows


def bars(path: Path, rows: list[dict[str, Any]]) -> None:
    """A bar for each ratio, with its spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['row']}: {figure}" + _against(row), value["ratio"], value["spread"])
        for row in rows
        for figure, value in row.items()
        if isinstance(value, dict) and value.get("ratio")
    ]
    if not bars:
        return
    labels, ratios, spreads = zip(*bars, strict=True)
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(bars) + 1.2))
    errors = [[r - s[0] for r, s in zip(ratios, spreads, strict=True)],
              [s[1] - r for r, s in zip(ratios, spreads, strict=True)]]  # fmt: skip
    axes.barh(range(len(bars)), ratios, xerr=errors, color="#3b6ea5", ecolor="#888888", height=0.6)
    axes.axvline(1.0, color="#b03030", linewidth=1)
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    peer = "peer" if any("peer" in row for row in rows) else "transformers"
    axes.set_xlabel(f"{peer} / loadstone (right of the line: loadstone needs less)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _against(row: dict[str, Any]) -> str:
    return f", {row['peer']}" if "peer" in row else ""


def importable() -> None:
    """Make this checkout importable as ``loadstone`` if no package of that name is installed, and only as that.

    The repository's root leaves the import path: transformers would take its folder ``kernels`` for a package it knows.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if util.find_spec("loadstone") is None:
        spec = util.spec_from_file_location("loadstone", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules["loadstone"] = package = util.module_from_spec(spec)
        spec.loader.exec_module(package)


def main(
    module: str,
    description: str,
    measure: Measure | None,
    run: Callable[[argparse.Namespace], None],
    *,
    peer: str | None = "transformers",
    options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Command line of a benchmark; ``--child`` is how it runs itself in a process of its own.

    measure: None where nothing runs in a process of its own. peer: the package without which there is no race, None if
        there is none. options: adds more of the command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each row (default 5)")
    parser.add_argument("--only", default="", help="only rows whose name contains this, replaced in the results")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "WORK"), help=argparse.SUPPRESS)
    if options is not None:
        options(parser)
    arguments = parser.parse_args()
    if arguments.child and measure is not None:
        importable()
        side, work = arguments.child
        print(json.dumps(measure(side, json.loads(work))))
        return
    if peer is not None and util.find_spec(peer) is None:
        sys.exit(f"{peer}, the peer of this race, is missing: pip install 'loadstone[bench]'")
    run(arguments)
