"""Races inside one process: calls timed in turn, and what the machine can do at most, measured in the same run.

For kernels, whose calls are too short for processes of their own. Each round times every side, one after the other,
in an order that turns around; a side's time in a round is the median of its calls.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import harness

harness.importable()

from loadstone.kernels import timing  # noqa: E402

Calls = Mapping[str, Callable[[], Any]]
_SECONDS_EACH = 0.05  # of one side in one round
_TOLERANCE = 0.03  # of a whole tensor in bf16
_DATA_SHEET = {  # dense bf16 TFLOP/s, from the vendors' data sheets
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312,
    "A10G": 70, "A10": 125, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307, "MI325X": 1307,
    "MI250X": 383,
}  # fmt: skip


def device() -> torch.device:
    """The GPU if there is one, else the CPU, which is said."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    print("no GPU: the rows for the CPU", flush=True)
    return torch.device("cpu")


def result_name(benchmark: str, place: torch.device) -> str:
    """Name of the results of a benchmark on a device: those of one kind of GPU do not replace another's."""
    if place.type == "cpu":
        return f"{benchmark}_cpu"
    name = torch.cuda.get_device_name(place)
    return benchmark + "_" + "_".join("".join(c.lower() if c.isalnum() else " " for c in name).split())


def race(calls: Calls, place: torch.device, rounds: int) -> dict[str, list[float]]:
    """{side: seconds of each round} of calls that are warm."""
    names = list(calls)
    counts = {}
    for name in names:
        once = statistics.median(timing.times(calls[name], place, 3))
        counts[name] = max(3, min(100, int(_SECONDS_EACH / max(once, 1e-7))))
    seen: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else names[::-1]:
            seen[name].append(statistics.median(timing.times(calls[name], place, counts[name])))
    return seen


def rows(
    name: str,
    work: dict[str, Any],
    seen: Mapping[str, list[float]],
    failed: Mapping[str, str],
    derive: Callable[[float], dict[str, float]],
    more: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """A row for each peer of "loadstone". derive: what else follows from a side's seconds (no ratios are taken of
    it). more: {side: {figure: value}}, measured once, of which less is better."""
    base = {"row": name, "work": work, "commit": harness.commit(), "date": harness.now()}
    made = []
    for peer in [*seen, *failed]:
        row: dict[str, Any] = {**base, "peer": peer}
        if peer in failed:
            row["failed"] = failed[peer]
            print(f"{name}\n    {peer}: {failed[peer]}", flush=True)
        elif peer == "loadstone" or "loadstone" in failed:
            continue
        else:
            sides = ("loadstone", peer)
            row["seconds"] = harness.compared(list(zip(seen["loadstone"], seen[peer], strict=True)), sides)
            for side in sides:
                for figure, value in derive(statistics.median(seen[side])).items():
                    row.setdefault(figure, {})[side] = value
            for figure in (more or {}).get("loadstone", {}):
                row[figure] = harness.compared([(more["loadstone"][figure], more[peer][figure])], sides)  # type: ignore[index]
            _print(row, sides)
        made.append(row)
    if not made and "loadstone" in seen:  # nobody to race: the figures all the same
        row = {**base, "peer": None, "seconds": {"loadstone": statistics.median(seen["loadstone"])}}
        row |= {k: {"loadstone": v} for k, v in derive(row["seconds"]["loadstone"]).items()}
        made.append(row)
    return made


def _print(row: dict[str, Any], sides: tuple[str, str]) -> None:
    harness.print_row(row, sides)
    for figure, value in row.items():
        if isinstance(value, dict) and set(value) == set(sides):
            print(
                f"    {figure:<28} {sides[0]} {value[sides[0]]:10.4g}   {sides[1]} {value[sides[1]]:10.4g}", flush=True
            )


def refuse_wrong(results: Mapping[str, tuple[torch.Tensor, ...]], failed: dict[str, str], reference: str) -> None:
    """Note in ``failed`` whose results differ by more than rounding from those of the first side whose name begins with
    ``reference``: nobody is timed on something else."""
    expected = next((result for name, result in results.items() if name.startswith(reference)), None)
    for name, result in results.items() if expected is not None else ():
        for one, other in zip(result, expected, strict=True):  # type: ignore[arg-type]
            off, size = float((one - other).float().norm()), float(other.float().norm())
            if not off <= _TOLERANCE * size:
                failed[name] = f"computes something else than {reference}: off by {off:.3g} of {size:.3g}"


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def ceilings(place: torch.device, quick: bool = False) -> dict[str, float]:
    """What this device does at most, by torch: FLOP/s of a large square product of the dtype that races use, and bytes
    per second, read and written, of a large copy."""
    on_gpu = place.type == "cuda"
    size = 1024 if quick else 8192 if on_gpu else 2048
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(size, size, device=place, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.ones((1 << 30 if on_gpu else 1 << 28) // (64 if quick else 1), dtype=torch.int8, device=place)
    target = torch.empty_like(source).copy_(source)
    torch.mm(left, right, out=out)
    product = statistics.median(timing.times(lambda: torch.mm(left, right, out=out), place, 10))
    copy = statistics.median(timing.times(lambda: target.copy_(source), place, 10))
    return {"matmul, FLOP/s": 2 * size**3 / product, "copy, B/s": 2 * source.numel() / copy}


def data_sheet(place: torch.device) -> float | None:
    """FLOP/s of dense bf16 products by the vendor's data sheet, None for a GPU that is not listed here."""
    if place.type != "cuda":
        return None
    name = torch.cuda.get_device_name(place)
    found = next((value for part, value in _DATA_SHEET.items() if part in name), None)
    return None if found is None else found * 1e12


def about(place: torch.device, ceiling: Mapping[str, float], missing: Mapping[str, str]) -> dict[str, Any]:
    """What a result says of its machine beside what `harness.environment` does."""
    facts: dict[str, Any] = {"ceilings": dict(ceiling), "missing": dict(missing)}
    if place.type == "cuda":
        facts["gpu"] = {
            "name": torch.cuda.get_device_name(place),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "memory_gb": round(torch.cuda.get_device_properties(place).total_memory / 1e9, 1),
            "data_sheet_flops": data_sheet(place),
        }
    return facts


def forget(place: torch.device) -> None:
    """Give memory back that an earlier case holds, as one that ran out of it may."""
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return f"unknown, {platform.release()}"
    return done.stdout.splitlines()[0].strip()


def exit_if_ours_failed(rows: list[dict[str, Any]]) -> None:
    """End with status 1, naming the rows, if "loadstone" failed in any: after the others are written."""
    broken = [f"{row['row']}: {row['failed']}" for row in rows if row["peer"] == "loadstone"]
    if broken:
        sys.exit("loadstone failed in\n" + "\n".join(broken))
