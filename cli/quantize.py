"""``loadstone quantize``: a checkpoint made into a quantized one, from files to files."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ..errors import ArgumentError
from ..loading.report import human, merge_numbers
from ..loading.source import resolve_source
from ..models.transcode import Quantized, quantize_checkpoint
from ..quant.config import BitsAndBytesConfig
from ..quant.weight_only import WeightOnlyConfig
from ..registry.remote_class import own_model_class
from .output import Output, listed, print_json
from .place import architecture_at, hub_options
from .progress import progress


def run(arguments: argparse.Namespace) -> None:
    """Write the checkpoint and print what came of it."""
    config = config_of(arguments)
    source = resolve_source(arguments.source, **hub_options(arguments))
    model_class = own_model_class(architecture_at(source, arguments))
    started = time.perf_counter()
    made = quantize_checkpoint(
        model_class,
        source,
        arguments.target,
        config,
        dtype=arguments.dtype,
        variant=arguments.variant,
        max_shard_size=arguments.max_shard_size,
        watch=progress("quantizing"),
    )
    facts = _facts(made, arguments.target, config.to_dict(), time.perf_counter() - started)
    if arguments.json:
        print_json(facts)
    else:
        _show(facts, Output())


def config_of(arguments: argparse.Namespace) -> Any:
    """The quantization that the options ask for. Raises ArgumentError for one that would have no effect."""
    of_4bit = {"--double-quant": arguments.double_quant, "--compute-dtype": arguments.compute_dtype,
               "--storage": arguments.storage, "--blocksize": arguments.blocksize}  # fmt: skip
    idle = {"--group-size": arguments.group_size} if arguments.method != "weight-only-int4" else {}
    idle |= of_4bit if arguments.method not in ("nf4", "fp4") else {}
    for option, value in idle.items():
        if value:
            raise ArgumentError(f"{option} has no effect with --{arguments.method}; leave it out")
    if arguments.method in ("nf4", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=arguments.method,
            bnb_4bit_use_double_quant=arguments.double_quant,
            bnb_4bit_compute_dtype=arguments.compute_dtype,
            bnb_4bit_quant_storage=arguments.storage,
            llm_int8_skip_modules=arguments.skip,
        )
        config.blocksize = arguments.blocksize or config.blocksize
        return config
    if arguments.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=arguments.skip)
    if arguments.method == "weight-only-int8":
        return WeightOnlyConfig(8, modules_to_not_convert=arguments.skip)
    return WeightOnlyConfig(4, arguments.group_size, arguments.skip)


def _facts(made: Quantized, target: str, config: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "directory": target,
        "model_class": made.model_class,
        "quantization_config": config,
        "bytes_before": made.written.bytes_before,
        "bytes_after": made.written.bytes_after,
        "quantized": made.modules,
        "not_quantized": made.plain,
        "left_out": list(made.written.unexpected),
        "files": made.written.files,
        "seconds": round(seconds, 3),
    }


def _show(facts: dict[str, Any], output: Output) -> None:
    output.line(f"{facts['directory']}: {facts['model_class']}, quantized", "bold")
    before, after = facts["bytes_before"], facts["bytes_after"]
    rows = [
        ("weights", f"{human(before)} to {human(after)} in {facts['seconds']:.1f} s"),
        ("quantized", f"{len(facts['quantized'])} layers"),
        ("left as they are", ", ".join(merge_numbers(facts["not_quantized"])) or "none"),
        ("files", listed(facts["files"])),
    ]
    if facts["left_out"]:
        rows.append(("UNEXPECTED, left out", ", ".join(merge_numbers(facts["left_out"]))))
    output.fields(rows)
