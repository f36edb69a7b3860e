"""Every way that weights come by, against other loaders and against what the machine can do at most.

A row is a checkpoint, a figure a way: mapped, mapped and touched, cast, read into memory (``disable_mmap``), the same
with a cold page cache (``posix_fadvise``), left on the disk, and to a GPU where there is one. Each side runs in fresh
processes that take turns, everything imported; page cache warm but for the cold ways. The side "limit" is a bare loop
over the same bytes, the fastest of a few (`loading_limits`); "times the limit" is what loadstone takes of it. Private
memory is the peak of anonymous memory beyond what the process had. Other loaders bring tensors, not models; they cast
tensor by tensor; those that are not for models on a CPU race on one bf16 file only. Peers that are not installed are
named in the results.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from . import harness, works
from . import loading_limits as limits
from .loading_peers import PEERS, NoWay, least, loader

WARM = ["mapped", "mapped, touched", "cast", "read", "read, cast"]
ROWS: dict[str, dict[str, Any]] = {
    "bf16, one file": {"work": "wide_bf16", "stored": "bfloat16", "dtype": "float32",
                       "ways": [*WARM[:-1], "on the disk"]},
    "fp32, one file": {"work": "wide_fp32", "stored": "float32", "dtype": "bfloat16", "ways": ["cast", "read, cast"]},
    "bf16, many shards": {"work": "wide_shards", "stored": "bfloat16", "dtype": "float32",
                          "ways": ["mapped, touched", "cast"]},
    # By itself and last: what warms up the page cache again does not make pages of the sizes that were there.
    "bf16, one file, cold": {"work": "wide_bf16", "stored": "bfloat16", "dtype": "float32", "ways": ["cold, read"]},
}  # fmt: skip
BOTH = ("transformers", "safetensors")  # on every row
GPU_WAYS = ["GPU", "GPU, cast", "cold, GPU"]
SPARE = 256.0  # MB beyond the model that a load may take
WANTED, WANTED_GPU = 1.2, 1 / 0.9  # times the limit


def measure(side: str, work: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peak private memory of each way, in one fresh process."""
    importlib.import_module("torch")
    if side == "transformers":
        importlib.import_module("logging").disable(importlib.import_module("logging").WARNING)
    files = sorted(Path(work["path"]).glob("*.safetensors"))
    if side in ("loadstone", "transformers"):  # so that everything is imported
        importlib.import_module(side).AutoModelForCausalLM.from_pretrained(work["tiny"])
    figures: dict[str, Any] = {}
    for way in work["ways"]:
        try:
            figures |= _measured(side, way, work, files)
        except NoWay as error:
            figures |= {f"{way}, s": str(error), f"{way}, MB": str(error)}
            if "GPU" in way:
                figures[f"{way}, MB on the device"] = str(error)
        gc.collect()
    return figures


def _measured(side: str, way: str, work: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    if side == "limit":
        limits.warm_cache(files)
        limits.warm_memory(_result_bytes(way, work))  # after the cache, which would take it
        more = {f"{way}, MB on the device": "not counted"} if "GPU" in way else {}
        return {f"{way}, s": least(way, work), f"{way}, MB": "not counted", **more}
    load = loader(side, way, work)
    (limits.drop_cache if "cold" in way else limits.warm_cache)(files)
    limits.warm_memory(_result_bytes(way, work))
    device: Any = harness.DeviceMemory() if "GPU" in way else nullcontext()
    with harness.PrivateMemory() as memory, device:
        before = memory.now()
        seconds, held = harness.timed(lambda: _done(load(), way))
    del held
    figures = {f"{way}, s": seconds, f"{way}, MB": memory.peak - before}
    return figures if "GPU" not in way else {**figures, f"{way}, MB on the device": device.peak}


def _done(held: Any, way: str) -> Any:
    """What a way brought, once it is really there."""
    torch = importlib.import_module("torch")
    if "touched" in way:
        limits.touch_pages(list(held.parameters()) if hasattr(held, "parameters") else list(held.values()))
    if "GPU" in way:
        torch.cuda.synchronize()
    return held


def _result_bytes(way: str, work: dict[str, Any]) -> int:
    """Bytes of the tensors in private memory once loaded."""
    if "mapped" in way or "disk" in way or "GPU" in way:
        return 0
    if "cast" not in way:
        return int(work["bytes"])
    size = {"float32": 4, "bfloat16": 2}
    return int(work["bytes"]) // size[work["stored"]] * size[work["dtype"]]


def derive(rows: list[dict[str, Any]], work: dict[str, Any]) -> None:
    """Times the limit and memory beyond the model, into the rows that they belong to."""
    for row in rows:
        found: dict[str, Any] = {}
        for way in work["ways"]:
            seconds, memory = row.get(f"{way}, s"), row.get(f"{way}, MB")
            if row["peer"] == "limit" and isinstance(seconds, dict) and seconds.get("ratio"):
                wanted = WANTED_GPU if "GPU" in way else WANTED
                found[f"{way}, times the limit"] = {"wanted": wanted, "found": 1 / seconds["ratio"]}
            if isinstance(memory, dict):
                for figure in ("ratio", "spread"):  # of next to nothing, for what is mapped
                    memory.pop(figure, None)
                beyond = memory["loadstone"] - _result_bytes(way, work) / 1e6
                found[f"{way}, MB beyond the model"] = {"wanted": SPARE, "found": beyond}
        row["targets"] = found


def run(arguments: argparse.Namespace) -> None:
    """All rows."""
    from . import side_by_side

    place = side_by_side.device()
    result = side_by_side.result_name("loading_paths", place)
    absent = harness.missing(PEERS)
    for text in absent.values():
        print(text, flush=True)
    there = [peer for peer in PEERS if peer not in absent]
    rows: list[dict[str, Any]] = []
    tiny = str(works.path_of("llama_tiny"))
    for name, spec in ROWS.items():
        if arguments.only not in name:
            continue
        path = works.path_of("llama_tiny" if arguments.quick else spec["work"])
        work = {**spec, "path": str(path), "tiny": tiny, "bytes": _weights_bytes(path)}
        if arguments.quick:
            work |= {"stored": "bfloat16", "dtype": "float32"}
        if place.type == "cuda":
            work["ways"] = [*work["ways"], *GPU_WAYS]
        peers = there if "bf16, one file" in name or place.type == "cuda" else [p for p in there if p in BOTH]
        sides = ["loadstone", *peers, "limit"]
        found = harness.race_all(__spec__.name, name, work, rounds=arguments.rounds, sides=sides, uncounted=0)
        derive(found, work)
        for row in found:
            row["work"] = {key: value for key, value in work.items() if key not in ("path", "tiny")}
            _print(row)
        rows += found
        about = side_by_side.about(place, limits.ceilings(), absent)
        harness.save(result, rows, merge=bool(arguments.only), about=about)  # a run may be cut off
    harness.write(result, rows, merge=bool(arguments.only), about=about, chart=chart)


def chart(path: Path, rows: list[dict[str, Any]]) -> None:
    """Seconds of each side, for each way of each checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seconds: dict[str, dict[str, float]] = {}
    for row in rows:
        for way in row["work"]["ways"]:
            for side in ("loadstone", row["peer"]):
                value = (row.get(f"{way}, s") or {}).get(side)
                if isinstance(value, float):
                    seconds.setdefault(f"{row['row']}: {way}", {})[side] = value
    sides = ["loadstone", *dict.fromkeys(row["peer"] for row in rows)]
    colors = dict(zip(sides, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    figure, axes = pyplot.subplots(figsize=(9, 0.12 * len(sides) * len(seconds) + 1.5))
    height = 0.8 / len(sides)
    for place, found in enumerate(seconds.values()):
        for number, side in enumerate(sides):
            if side in found:
                label = side if side not in axes.get_legend_handles_labels()[1] else None
                axes.barh(place + number * height, found[side], height, color=colors.get(side), label=label)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(seconds))], list(seconds), fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds (limit: a bare loop over the same bytes)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _weights_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _print(row: dict[str, Any]) -> None:
    for name, target in row["targets"].items() if row["peer"] == "limit" else ():
        print(f"    {name:<36} {target['found']:8.2f}   (at most {target['wanted']:.4g})", flush=True)


def options(parser: argparse.ArgumentParser) -> None:
    """What this benchmark has beside the harness's own."""
    parser.add_argument("--quick", action="store_true", help="one round of a tiny checkpoint, to see that it runs")
    parser.set_defaults(rounds=3)


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run, peer=None, options=options)
