"""Races: the same work done by two sides in alternating fresh processes, ratios pair by pair, results as JSON and PNG.

A benchmark module defines ``measure(side, work) -> dict of figures``, which runs in a process of its own, and calls
`race` for each row. The figures of a row are medians over the rounds; a ratio is the median of the rounds' ratios,
with the smallest and largest beside it.
"""

from __future__ import annotations

import argparse
import compileall
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_POPULATE_WRITE = 23  # Linux 5.14
Measure = Callable[[str, dict[str, Any]], dict[str, float]]


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
                    return int(line.split()[1]) / 1e3
        return float("nan")


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
    _compile_sources()
    seen: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(rounds + uncounted):
        for side in sides if turn % 2 else sides[::-1]:
            figures = _child(module, side, work)
            if turn >= uncounted:
                seen[side].append(figures)
    ours, peers = (seen[side] for side in sides)
    row: dict[str, Any] = {"row": name, "work": work, "rounds": rounds, "commit": commit(), "date": now()}
    for figure in ours[0]:
        ratios = sorted(p[figure] / o[figure] for o, p in zip(ours, peers, strict=True) if o[figure])
        row[figure] = {
            sides[0]: statistics.median(o[figure] for o in ours),
            sides[1]: statistics.median(p[figure] for p in peers),
            "ratio": statistics.median(ratios) if ratios else None,
            "spread": [ratios[0], ratios[-1]] if ratios else None,
        }
    _print_row(row, sides)
    return row


@lru_cache(maxsize=1)
def _compile_sources() -> None:
    """Byte-compile loadstone, as pip does for what it installs: an editable install may never have been."""
    for folder in ("cli", "kernels", "loading", "models", "quant", "registry"):
        compileall.compile_dir(ROOT / folder, quiet=2)
    compileall.compile_dir(ROOT, maxlevels=0, quiet=2)


def _child(module: str, side: str, work: dict[str, Any]) -> dict[str, float]:
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


def _print_row(row: dict[str, Any], sides: tuple[str, str]) -> None:
    print(row["row"], flush=True)
    for figure, value in row.items():
        if isinstance(value, dict) and "ratio" in value:
            low, high = value["spread"] or (0, 0)
            print(
                f"    {figure:<28} {sides[0]} {value[sides[0]]:10.4f}   {sides[1]} {value[sides[1]]:10.4f}   "
                f"ratio {value['ratio'] or 0:7.2f}  ({low:.2f} to {high:.2f})",
                flush=True,
            )


def environment() -> dict[str, Any]:
    """The machine, versions, date and commit that a result belongs to."""
    versions = {}
    for package in ("torch", "transformers", "accelerate", "safetensors", "huggingface_hub", "triton"):
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


def commit() -> str:
    """The commit that is being measured, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def now() -> str:
    """The time, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _cpu() -> str:
    with open("/proc/cpuinfo") as info:
        return next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())


def write(name: str, rows: list[dict[str, Any]], *, merge: bool = False) -> Path:
    """Write ``results/<name>.json``, and a bar chart of the ratios beside it if matplotlib is there.

    merge: replace rows of the same name in what is there, and leave the others; each row has its own date and commit.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {"benchmark": name, **environment(), "rows": rows}
    if merge and path.exists():
        result = json.loads(path.read_text())
        renewed = {row["row"]: row for row in rows}
        result["rows"] = rows = [renewed.pop(row["row"], row) for row in result["rows"]] + list(renewed.values())
    path.write_text(json.dumps(result, indent=1) + "\n")
    _plot(name, rows)
    print(f"written to {path.relative_to(ROOT)}")
    return path


def _plot(name: str, rows: list[dict[str, Any]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no chart")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['row']}: {figure}", value["ratio"], value["spread"])
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
    axes.set_xlabel("transformers / loadstone (right of the line: loadstone needs less)")
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)


def main(module: str, description: str, measure: Measure, run: Callable[[argparse.Namespace], None]) -> None:
    """Command line of a benchmark; ``--child`` is how it runs itself in a process of its own."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each row (default 5)")
    parser.add_argument("--only", default="", help="only rows whose name contains this, replaced in the results")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "WORK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        # Started from the repository's root, whose folder ``kernels`` transformers would take for a package it knows.
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
        side, work = arguments.child
        print(json.dumps(measure(side, json.loads(work))))
        return
    try:
        metadata.version("transformers")
    except metadata.PackageNotFoundError:
        sys.exit("transformers, the peer of this race, is missing: pip install 'loadstone[bench]'")
    run(arguments)
