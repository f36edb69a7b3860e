"""``loadstone tune``: search block sizes for this machine's GPU, and keep what is faster."""

from __future__ import annotations

import argparse
import math

from ..kernels import search, tuning
from .output import Output, print_json


def run(arguments: argparse.Namespace) -> None:
    """Search, print each result as it comes, and keep it. Raises KernelError without a GPU, or for unknown names."""
    device = search.gpu_to_tune(arguments.device)
    name = tuning.device_name(device)
    assert name is not None
    chosen = search.selection(device, arguments.kernel, arguments.shape_class)
    path = tuning.tuned_path(name)
    output = None if arguments.json else Output()
    if output:
        output.heading(f"{name}: {len(chosen)} searches" + (", nothing is kept" if arguments.dry_run else ""))
    results = []
    for found in search.tune(
        device, chosen, timer=search.gpu_timer(device), quick=arguments.quick, keep=not arguments.dry_run
    ):
        results.append(found.to_dict())
        if output:
            _show(found, output)
    if output is None:
        print_json({"device": name, "kept_in": None if arguments.dry_run else str(path), "results": results})
        return
    better = sum(result["improved"] for result in results)
    output.heading(
        f"{better} of {len(results)} faster" + ("" if arguments.dry_run or not better else f", kept in {path}")
    )


def _show(found: search.Found, output: Output) -> None:
    failed = [attempt for attempt in found.attempts if attempt.failed]
    output.line(f"{found.kernel} {found.shape_class}: {len(found.attempts)} tried, {len(failed)} failed")
    for attempt in failed:
        output.line(f"    {sizes_text(attempt.sizes)}: {attempt.failed}", "dim")
    rows = [("in use", f"{seconds_text(found.before.seconds)}  {sizes_text(found.before.sizes)}")]
    if found.improved:
        gain = found.before.seconds / found.after.seconds
        note = f"  {gain:.2f} times as fast" if math.isfinite(gain) else ""
        rows.append(("found", f"{seconds_text(found.after.seconds)}  {sizes_text(found.after.sizes)}{note}"))
    else:
        rows.append(("found", "nothing faster"))
    output.fields(rows)


def sizes_text(sizes: dict[str, int]) -> str:
    """``BLOCK_M=128 num_warps=4``."""
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def seconds_text(seconds: float) -> str:
    """Microseconds, or "fails"."""
    return f"{seconds * 1e6:.1f} us" if math.isfinite(seconds) else "fails"
