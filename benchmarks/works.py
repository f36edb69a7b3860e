"""The checkpoints that benchmarks work on, made once and kept under ``.cache/bench`` (git ignores it)."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from .harness import ROOT

CACHE = ROOT / ".cache" / "bench"

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_1B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
GPT2_SMALL = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}


def path_of(work: str) -> Path:
    """The directory of ``llama1b``, ``gpt2s``, ``smollm2`` or ``llama70b`` (headers and holes), made if need be."""
    directory = CACHE / work
    if (directory / "config.json").exists():
        return directory
    if work == "smollm2":
        from tests.smollm2 import smollm2_directory

        return Path(smollm2_directory())
    staged = CACHE / f"{work}.{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    {"llama1b": _llama_1b, "gpt2s": _gpt2_small, "llama70b": _llama_70b}[work](staged)
    staged.rename(directory)
    return directory


def _llama_1b(directory: Path) -> None:
    _random(directory, LLAMA_1B, max_shard_size="500MB")


def _gpt2_small(directory: Path) -> None:
    _random(directory, GPT2_SMALL, max_shard_size="5GB")


def _random(directory: Path, config: dict[str, Any], max_shard_size: str) -> None:
    import torch

    from loadstone import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = dict(config)
    built = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(built).save_pretrained(directory, max_shard_size=max_shard_size)


def _llama_70b(directory: Path) -> None:
    """30 shards whose headers are real and whose data is a hole: 141 GB that take no room."""
    import torch

    from loadstone import AutoConfig
    from loadstone.models.llama import LlamaForCausalLM
    from loadstone.models.pretrained import build_on_meta

    values = dict(LLAMA_70B)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = build_on_meta(LlamaForCausalLM, config)
    tensors = [(name, list(p.shape)) for name, p in model.state_dict().items()]
    per_shard = math.ceil(len(tensors) / 30)
    weight_map, total = {}, 0
    for index in range(30):
        name = f"model-{index + 1:05d}-of-00030.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, shape in tensors[index * per_shard : (index + 1) * per_shard]:
            size = math.prod(shape) * torch.bfloat16.itemsize
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / name, "wb") as shard:
            shard.write(struct.pack("<Q", len(text)) + text)
            shard.truncate(8 + len(text) + end)
        total += end
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index_text)
    (directory / "config.json").write_text(json.dumps(LLAMA_70B))
