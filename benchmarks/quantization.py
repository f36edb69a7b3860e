"""Quantized models against transformers with bitsandbytes, on the CPU: loading, memory, forward, and the command.

TinyLlama's shape with random bf16 weights, quantized while it is loaded. Each side runs in a fresh process with its
imports done, and reports the load, the bytes its weights take, the peak of its private memory while loading, and the
median of a forward of 1, 16 and 512 tokens. ``command``: `loadstone quantize`, streaming, beside loading and saving.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import harness, works

ROWS: list[tuple[str, dict[str, Any]]] = [
    ("NF4", {"what": "load", "bits": 4, "options": {"bnb_4bit_quant_type": "nf4"}}),
    ("NF4, double quantization", {"what": "load", "bits": 4,
                                  "options": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}),
    ("int8", {"what": "load", "bits": 8, "options": {}}),
]  # fmt: skip
TOKENS = (1, 16, 512)


def configuration(side: str, work: dict[str, Any]) -> Any:
    """The side's own BitsAndBytesConfig for a row."""
    torch = importlib.import_module("torch")
    options = dict(work["options"])
    if work["bits"] == 4:
        options |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    else:
        options |= {"load_in_8bit": True}
    return importlib.import_module(side).BitsAndBytesConfig(**options)


def measure(side: str, work: dict[str, Any]) -> dict[str, float]:
    """Figures of one side in this process."""
    torch = importlib.import_module("torch")
    importlib.import_module("logging").disable(importlib.import_module("logging").WARNING)
    auto = importlib.import_module(side).AutoModelForCausalLM
    importlib.import_module("loadstone.models.llama" if side == "loadstone" else "transformers.models.llama")
    if side == "transformers":
        importlib.import_module("bitsandbytes")
    harness.warm_memory(2.5)
    before = harness.PrivateMemory.now()
    with harness.PrivateMemory() as memory:
        options = {"quantization_config": configuration(side, work), "dtype": torch.bfloat16, "device_map": "cpu"}
        seconds, model = harness.timed(lambda: auto.from_pretrained(work["path"], **options))
    held = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    figures = {
        "load, s": seconds,
        "peak private memory while loading, MB": memory.peak - before,
        "parameters and buffers, MB": held / 1e6,
    }
    for count in TOKENS:
        ids = torch.randint(0, 30000, (1, count), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(ids)
            times = [harness.timed(lambda: model(ids))[0] for _ in range(1 if count == TOKENS[-1] else 3)]  # noqa: B023
        figures[f"forward of {count} tokens, s"] = statistics.median(times)
    return figures


def convert(side: str, work: dict[str, Any]) -> dict[str, float]:
    """`loadstone quantize` against the peer's way: load quantized, then save."""
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "out")
        if side == "loadstone":
            main = importlib.import_module("loadstone.cli.main").main
            argv = ["quantize", work["path"], target, "--nf4", "--compute-dtype", "bfloat16", "--json"]
            importlib.import_module("torch")
            with harness.PrivateMemory() as memory:
                sys.stdout, kept = sys.stderr, sys.stdout
                try:
                    seconds, status = harness.timed(lambda: main(argv))
                finally:
                    sys.stdout = kept
            if status:
                raise RuntimeError(f"loadstone quantize ended with {status}")
        else:
            auto = importlib.import_module(side).AutoModelForCausalLM
            importlib.import_module("bitsandbytes")
            with harness.PrivateMemory() as memory:
                options = {"quantization_config": configuration(side, work), "device_map": "cpu"}

                def run() -> None:
                    auto.from_pretrained(work["path"], **options).save_pretrained(target)

                seconds, _ = harness.timed(run)
        return {"checkpoint to checkpoint, s": seconds, "peak private memory, MB": memory.peak}


def side_figures(side: str, work: dict[str, Any]) -> dict[str, float]:
    """What a child process reports."""
    return convert(side, work) if work["what"] == "convert" else measure(side, work)


def run(arguments: argparse.Namespace) -> None:
    """All rows."""
    if importlib.util.find_spec("bitsandbytes") is None:
        sys.exit("bitsandbytes, the peer of this race, is missing: pip install 'loadstone[bench]' bitsandbytes")
    rows = []
    path = str(works.path_of("llama1b"))
    command = ("NF4, from checkpoint to checkpoint", {**ROWS[0][1], "what": "convert"})
    for name, work in [*ROWS, command]:
        if arguments.only in name:
            row = harness.race(__spec__.name, name, {**work, "path": path}, rounds=arguments.rounds, uncounted=0)
            row["work"].pop("path")
            rows.append(row)
            harness.write("quantization", [row], merge=bool(arguments.only) or len(rows) > 1)


if __name__ == "__main__":
    harness.main(__spec__.name, __doc__ or "", side_figures, run)
