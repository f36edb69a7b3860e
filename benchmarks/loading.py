"""Loading against transformers: fresh process and everything imported, same dtype and cast, and to the first logits.

Each side runs in a fresh process that imports torch first; page cache warm. ``load, fresh`` includes the lazy imports
of the first load, ``load, imported`` is the second load of the process. Private memory is the peak of anonymous
memory over import, load and first logits (mapped weights are not private). Weights that are mapped are read when
first used: the logits row holds that cost. Before a cast of gigabytes both sides touch and give back fresh memory, for
virtual machines can take seconds to find memory that has been free for a while, whoever asks first.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from typing import Any

from . import harness, works

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("llama1b bf16", {"work": "llama1b"}),
    ("llama1b bf16, device_map=cpu", {"work": "llama1b", "kwargs": {"device_map": "cpu"}}),
    ("llama1b bf16, device_map=auto", {"work": "llama1b", "kwargs": {"device_map": "auto"}}),
    ("llama1b bf16 to fp32", {"work": "llama1b", "kwargs": {"dtype": "float32"}, "warm": 7}),
    ("gpt2s fp32", {"work": "gpt2s"}),
    ("smollm2 bf16", {"work": "smollm2"}),
    ("smollm2 bf16 to fp32", {"work": "smollm2", "kwargs": {"dtype": "float32"}, "warm": 2}),
]


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Times and peak private memory of one fresh process."""
    torch = importlib.import_module("torch")
    if side == "transformers":
        importlib.import_module("logging").disable(importlib.import_module("logging").WARNING)
    path, kwargs = work["path"], work.get("kwargs", {})
    ids = torch.arange(16)[None]
    for _ in range("warm" in work):
        harness.warm_memory(work["warm"])
    with harness.PrivateMemory() as memory, torch.no_grad():
        imports, auto = harness.timed(lambda: importlib.import_module(side).AutoModelForCausalLM)
        fresh, model = harness.timed(lambda: auto.from_pretrained(path, **kwargs))
        logits, _ = harness.timed(lambda: model(ids).logits)
    del model
    gc.collect()
    for _ in range("warm" in work):
        harness.warm_memory(work["warm"])
    with torch.no_grad():
        again, model = harness.timed(lambda: auto.from_pretrained(path, **kwargs))
    return {
        "load, fresh, s": fresh,
        "load, imported, s": again,
        "import + load + logits, s": imports + fresh + logits,
        "first logits, s": logits,
        "private memory, MB": memory.peak,
    }


def plan_70b() -> dict[str, Any]:
    """Seconds to build a 70B shape on meta and plan its load from 30 shards' headers, ours alone, imports excluded."""
    from loadstone import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(works.path_of("gpt2s"), device_map="meta")
    path = works.path_of("llama70b")
    times = [harness.timed(lambda: AutoModelForCausalLM.from_pretrained(path, device_map="meta"))[0] for _ in range(7)]
    row = {"row": "70B shape, built and planned", "seconds": sorted(times)}
    print(f"{row['row']}: {sorted(times)[3]:.3f} s (median of 7)")
    return row


def run(arguments: argparse.Namespace) -> None:
    """All rows."""
    rows = []
    for name, work in ROWS:
        if arguments.only in name:
            path = str(works.path_of(work["work"]))
            rows.append(harness.race(__spec__.name, name, {**work, "path": path}, rounds=arguments.rounds, uncounted=0))
            rows[-1]["work"].pop("path")
    if arguments.only in "70B":
        rows.append(plan_70b())
    harness.write("loading", rows, merge=bool(arguments.only))


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", measure, run)
