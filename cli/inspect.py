"""``loadstone inspect``: what a checkpoint holds and how it would be loaded, from headers only."""

from __future__ import annotations

import argparse
from typing import Any

from ..loading.report import human, merge_numbers
from ..models.causal_lm import CausalLM
from ..models.origin import Origin
from ..models.preview import Preview
from ..quant.config import BitsAndBytesConfig
from ..registry.remote_class import previewer_of
from .output import Output, count, print_json
from .place import architecture_at, memory_of, source_of, split_gguf

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "vocab_size", "max_position_embeddings", "sliding_window")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print what was found."""
    split_gguf(arguments)
    source = source_of(arguments)
    row = architecture_at(source, arguments)
    seen = previewer_of(row)(
        source,
        dtype=arguments.dtype,
        device_map=arguments.device_map,
        max_memory=memory_of(arguments),
        variant=arguments.variant,
        quantization_config=_asked(arguments.quantize),
        **_origin(arguments),
    )
    facts = _facts(seen, source.commit, getattr(seen.config, "model_type", ""), row.origin)
    if arguments.json:
        print_json(facts)
    else:
        _show(facts, Output())


def _origin(arguments: argparse.Namespace) -> dict[str, Origin]:
    """Where the weights come from, if not from safetensors."""
    if not arguments.pickled and arguments.gguf_file is None:
        return {}
    origin = Origin(arguments.variant, False if arguments.pickled else None, None, arguments.gguf_file)
    origin.check()
    return {"origin": origin}


def _asked(kind: str | None) -> BitsAndBytesConfig | None:
    if kind is None:
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)


def _facts(seen: Preview, commit: str | None, model_type: str, origin: str) -> dict[str, Any]:
    checkpoint, plan, model = seen.checkpoint, seen.plan, seen.model
    total, quantizer = _parameters(model), getattr(model, "hf_quantizer", None)
    in_file: dict[str, int] = {}
    in_dtype: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        stored = entry.nbytes if entry.values is None else entry.values.stored
        in_file[entry.file.name] = in_file.get(entry.file.name, 0) + stored
        name = (entry.values and entry.values.form) or str(entry.dtype).removeprefix("torch.")
        in_dtype[name] = in_dtype.get(name, 0) + stored
    return {
        "name": checkpoint.name,
        "commit": commit,
        "model_type": model_type,
        "model_class": type(model).__name__,
        "origin": origin,
        "sizes": {name: getattr(seen.config, name) for name in _SIZES if getattr(seen.config, name, None) is not None},
        "parameters": total,
        "quantization": None if quantizer is None else quantizer.config.to_dict(),
        "checkpoint": {"tensors": len(checkpoint.entries), "bytes": checkpoint.total_bytes, "bytes_by_dtype": in_dtype,
                       "bytes_by_file": in_file, "index_faults": list(checkpoint.index_faults)},
        "plan": {
            "tensors": len(plan.moves),
            "bytes_by_dtype": plan.memory_by_dtype(),
            "bytes_by_device": plan.memory_by_device(),
            "bytes_by_transform": plan.bytes_by_transform(),
            "bytes_quantized": list(plan.bytes_quantized()),
            "limits": dict(plan.placement.limits),
            "reserved_for_visitors": plan.placement.reserved,
            "does_not_fit": [
                {"place": str(short.place), "needed": short.needed, "limit": short.limit, "what": short.reason}
                for short in plan.placement.shortfalls
            ],
            "device_map": plan.placement.as_hf() if plan.placement.given else None,
            "tied": {**plan.tied, **plan.compare},
            "missing": list(plan.missing),
            "unexpected": list(plan.unexpected),
            "mismatched": [str(mismatch) for mismatch in plan.mismatched],
            "ignored": list(plan.ignored),
        },
    }  # fmt: skip


def _parameters(model: Any) -> int:
    """How many numbers the weights are, tied ones once; a class of a repository may not be loadstone's."""
    if not isinstance(model, CausalLM):
        return sum(parameter.numel() for parameter in model.parameters())
    return model.num_parameters() - sum(model.get_parameter(name).numel() for name in model.active_ties())


def _show(facts: dict[str, Any], output: Output) -> None:
    checkpoint, plan = facts["checkpoint"], facts["plan"]
    output.line(facts["name"] + (f" at commit {facts['commit']}" if facts["commit"] else ""), "bold")
    output.heading("Model")
    output.fields(
        [
            ("architecture", f"{facts['model_class']} ({facts['model_type']}, of {facts['origin']})"),
            ("parameters", f"{count(facts['parameters'])} ({facts['parameters']:,})"),
            *((name, f"{value:,}") for name, value in facts["sizes"].items()),
            *([("quantization", _method(facts["quantization"]))] if facts["quantization"] else []),
        ]
    )
    output.heading("Checkpoint")
    output.fields([("tensors", f"{checkpoint['tensors']:,}"), *_sizes(checkpoint["bytes_by_dtype"]),
                   *_sizes(_shortened(checkpoint["bytes_by_file"]))])  # fmt: skip
    output.heading("Plan")
    places = [(_place(device), _of_limit(size, plan["limits"].get(device)))
              for device, size in plan["bytes_by_device"].items()]  # fmt: skip
    if plan["reserved_for_visitors"]:
        places += [("kept free for offloaded blocks", human(plan["reserved_for_visitors"]))]
    before = human(plan["bytes_quantized"][0])
    ways = {"map": "mapped, not read", "cast": "cast", "copy": "copied", "quantize": f"quantized, of {before}",
            "disk": "mapped, used from the files", "none": "left on meta"}  # fmt: skip
    places += [(ways[name], human(size)) for name, size in plan["bytes_by_transform"].items()]
    output.fields([*places, *_sizes(plan["bytes_by_dtype"])])
    if len(plan["device_map"] or ()) > 1:
        output.heading("Device map")
        by_device: dict[str, list[str]] = {}
        for module, device in plan["device_map"].items():
            by_device.setdefault(str(device), []).append(module)
        # A trailing dot lets numbers at the end of a name merge as those inside do.
        output.fields((device, ", ".join(line.rstrip(".") for line in merge_numbers(f"{m}." for m in modules)))
                      for device, modules in by_device.items())  # fmt: skip
    if plan["does_not_fit"]:
        output.heading("DOES NOT FIT")
        output.fields((one["place"], f"needs {human(one['needed'])} for {one['what']}, may take {human(one['limit'])}")
                      for one in plan["does_not_fit"])  # fmt: skip
    _show_misfits(plan, checkpoint["index_faults"], output)


def _show_misfits(plan: dict[str, Any], faults: list[str], output: Output) -> None:
    rows = [("tied", f"{target} = {source}") for target, source in plan["tied"].items()]
    for kind, what in (("missing", "MISSING, would be initialised"), ("unexpected", "UNEXPECTED, would be left out"),
                       ("mismatched", "MISMATCHED, would not load"), ("ignored", "not needed")):  # fmt: skip
        rows += [(what, line) for line in merge_numbers(plan[kind])]
    rows += [("index", fault) for fault in faults]
    if rows:
        output.heading("Weights")
        output.fields(rows)


def _place(device: str) -> str:
    return "left in the files" if device == "disk" else f"memory on {device}"


def _of_limit(size: int, limit: int | None) -> str:
    return human(size) + (f" of {human(limit)}" if limit is not None else "")


def _method(quantization: dict[str, Any]) -> str:
    """The method, and the kind of codes where the configuration has bitsandbytes' fields."""
    kind = quantization.get("bnb_4bit_quant_type") if quantization.get("load_in_4bit") else None
    kind = "int8" if quantization.get("load_in_8bit") else kind
    return str(quantization["quant_method"]) + (f", {kind}" if kind else "")


def _sizes(sizes: dict[str, int]) -> list[tuple[str, str]]:
    return [(name, human(size)) for name, size in sizes.items()]


def _shortened(files: dict[str, int], shown: int = 6) -> dict[str, int]:
    """The first files, and the others in one row."""
    if len(files) <= shown:
        return files
    names = list(files)
    return {**{name: files[name] for name in names[: shown - 1]},
            f"and {len(names) - shown + 1} more files": sum(files[name] for name in names[shown - 1 :])}  # fmt: skip
