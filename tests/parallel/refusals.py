"""Loads on a mesh that must fail, on all ranks and without waiting; and what each rank saw."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from loadstone import AutoModelForCausalLM, LlamaForCausalLM, ParallelConfig
from loadstone.loading import parallel_load

Seen = tuple[str, str]
KEYS = "model.layers.*.self_attn.[kv]_proj"


def attempt(place: Any, **options: Any) -> Seen:
    try:
        AutoModelForCausalLM.from_pretrained(place, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "it was loaded"


def named(*sizes: int, names: tuple[str, ...] | None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def seen(rank: int, place: Path, odd: Path, other: Path) -> dict[str, Seen]:
    """Every attempt by name. One after the other in one group: a rank that waited for another would be stuck."""
    tp, fsdp = named(2, names=("tp",)), named(2, names=("fsdp",))
    found = {
        "device_map": attempt(place, device_mesh=fsdp, device_map="cpu"),
        "no mesh": attempt(place, parallel="fsdp"),
        "not a mesh": attempt(place, device_mesh=(2,)),
        "unknown dimension": attempt(place, device_mesh=named(2, names=("tpp",))),
        "two of one meaning": attempt(place, device_mesh=named(2, 1, names=("dp", "fsdp"))),
        "no names": attempt(place, device_mesh=named(2, 1, names=None), parallel="fsdp+tp"),
        "order": attempt(place, device_mesh=named(2, 1, names=("tp", "fsdp"))),
        "nothing sharded": attempt(place, device_mesh=named(2, names=("replicate",))),
        "unused dimension": attempt(place, device_mesh=named(2, 1, names=("fsdp", "tp")), parallel="tp"),
        "unknown strategy": attempt(place, device_mesh=tp, parallel="ftp"),
        "heads": attempt(odd / "heads", device_mesh=tp),
        "kv heads": attempt(odd / "kv", device_mesh=tp, parallel=ParallelConfig(tp_plan={KEYS: "colwise"})),
        "intermediate": attempt(odd / "intermediate", device_mesh=tp),
        "vocabulary": attempt(odd / "vocabulary", device_mesh=tp),
        "style": attempt(place, device_mesh=tp, parallel=ParallelConfig(tp_plan={"lm_head": "columns"})),
        "pattern": attempt(place, device_mesh=tp, parallel=ParallelConfig(tp_plan={"model.head": "colwise"})),
        "module": attempt(place, device_mesh=tp, parallel=ParallelConfig(tp_plan={"model.norm": "colwise"})),
        "tied apart": attempt(odd / "tied", device_mesh=tp, parallel=ParallelConfig(tp_plan={"lm_head": None})),
        "tied values": attempt(odd / "untied", device_mesh=fsdp),
        "one argument differs": attempt(place, device_mesh=fsdp, dtype=("float32", "bfloat16")[rank]),
        "one lacks the directory": attempt(place if rank == 0 else place.parent / "nowhere", device_mesh=fsdp),
        "one has another checkpoint": attempt(place if rank == 0 else other, device_mesh=fsdp),
        "one has a damaged file": attempt(place if rank == 0 else odd / "damaged", device_mesh=fsdp),
        "both lack it": attempt(place.parent / "nowhere", device_mesh=fsdp),
    }
    found["kept whole"] = attempt(
        odd / "vocabulary",
        device_mesh=tp,
        parallel=ParallelConfig(tp_plan={"lm_head": None, "model.embed_tokens": None}),
    )
    kept, LlamaForCausalLM._no_split_modules = LlamaForCausalLM._no_split_modules, []
    found["no layers"] = attempt(place, device_mesh=fsdp)
    LlamaForCausalLM._no_split_modules = kept
    plan, LlamaForCausalLM._tp_plan = LlamaForCausalLM._tp_plan, {}
    found["no plan"] = attempt(place, device_mesh=tp)
    LlamaForCausalLM._tp_plan = plan
    found["a file goes while it is read"] = _vanishing(rank, place, fsdp)
    model = AutoModelForCausalLM.from_pretrained(place, device_mesh=fsdp)
    for name, call in {
        "resize": lambda: model.resize_token_embeddings(128),
        "push": lambda: model.push_to_hub("a/b"),
        "saving to a file": lambda: model.save_pretrained(place / "config.json"),
    }.items():
        try:
            call()
            found[name] = ("", "it was done")
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    found["afterwards"] = attempt(place, device_mesh=fsdp)
    return found


def _vanishing(rank: int, place: Path, mesh: Any) -> Seen:
    """Rank 1's file is gone after all have agreed."""
    copy = Path(f"{place}-copy-{rank}")
    shutil.copytree(place, copy)
    agreed = parallel_load.Spread.execute

    def execute(self: Any, *args: Any) -> Any:
        if rank == 1:
            (copy / "model.safetensors").unlink()
        return agreed(self, *args)

    parallel_load.Spread.execute = execute  # type: ignore[method-assign]
    try:
        return attempt(copy, device_mesh=mesh)
    finally:
        parallel_load.Spread.execute = agreed  # type: ignore[method-assign]


def make(directory: Path) -> tuple[Path, Path, Path]:
    """The checkpoints for `seen`."""
    import tiny
    from parallel.steps import SIZES
    from safetensors.torch import load_file, save_file

    odd = directory / "odd"
    tiny.checkpoint(directory / "good", "llama", **SIZES)
    tiny.checkpoint(directory / "other", "llama", **{**SIZES, "num_hidden_layers": 1})
    changes: dict[str, dict[str, Any]] = {
        "heads": {"num_attention_heads": 1, "num_key_value_heads": 1},
        "kv": {"num_key_value_heads": 1},
        "intermediate": {"intermediate_size": 47},
        "vocabulary": {"vocab_size": 61},
        "tied": {"tie_word_embeddings": True},
        "untied": {"tie_word_embeddings": True},
        "damaged": {},
    }
    for name, change in changes.items():
        tiny.checkpoint(odd / name, "llama", **{**SIZES, **change})
    file = odd / "untied" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": torch.randn_like(tensors["model.embed_tokens.weight"])}, file)
    (odd / "damaged" / "model.safetensors").write_bytes(b"\x00" * 100)
    return directory / "good", odd, directory / "other"
