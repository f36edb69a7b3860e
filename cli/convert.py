"""``loadstone convert``: a checkpoint of any format that is read, as safetensors."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..loading.report import human, merge_numbers
from ..models.convert import Converted
from ..models.fields import dtype_name
from ..registry.convert import convert_checkpoint
from .output import Output, listed, print_json
from .place import hub_options
from .progress import progress


def run(arguments: argparse.Namespace) -> None:
    """Write the checkpoint and print what came of it."""
    started = time.perf_counter()
    made = convert_checkpoint(
        arguments.source,
        arguments.target,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        variant=arguments.variant,
        use_safetensors=False if arguments.pickled else None,
        gguf_file=arguments.gguf_file,
        **hub_options(arguments),
        subfolder=arguments.subfolder,
        trust_remote_code=arguments.trust_remote_code,
        code_revision=arguments.code_revision,
        watch=progress("converting"),
    )
    facts = _facts(made, arguments.target, time.perf_counter() - started)
    if arguments.json:
        print_json(facts)
    else:
        _show(facts, Output())


def _facts(made: Converted, target: str, seconds: float) -> dict[str, Any]:
    return {
        "directory": target,
        "model_class": made.model_class,
        "source_files": made.source_files,
        "bytes_by_dtype": {dtype_name(dtype): size for dtype, size in made.written.by_dtype.items()},
        "bytes_before": made.written.bytes_before,
        "bytes_after": made.written.bytes_after,
        "left_out": list(made.written.unexpected),
        "files": made.written.files,
        "seconds": round(seconds, 3),
    }


def _show(facts: dict[str, Any], output: Output) -> None:
    output.line(f"{facts['directory']}: {facts['model_class']}", "bold")
    before, after = human(facts["bytes_before"]), human(facts["bytes_after"])
    rows = [
        ("read", listed(facts["source_files"])),
        ("weights", f"{before} to {after} in {facts['seconds']:.1f} s"),
        *((name, human(size)) for name, size in facts["bytes_by_dtype"].items()),
        ("files", listed(facts["files"])),
    ]
    if facts["left_out"]:
        rows.append(("UNEXPECTED, left out", ", ".join(merge_numbers(facts["left_out"]))))
    output.fields(rows)
