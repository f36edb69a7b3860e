"""The checkpoints that benchmarks work on, made once and kept under ``.cache/bench`` (git ignores it)."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from importlib import util
from pathlib import Path
from typing import Any

from .harness import ROOT, importable

CACHE = ROOT / ".cache" / "bench"

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B: dict[str, Any] = {
    **LLAMA_1B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_8B = {
    **LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_7B = {
    **LLAMA_1B, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32,
}  # fmt: skip
LLAMA_SMALL = {
    **LLAMA_1B, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
}  # fmt: skip
LLAMA_TINY = {
    **LLAMA_SMALL, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
GPT2_SMALL = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}


def path_of(work: str) -> Path:
    """The directory of ``llama1b``, ``llama8b``, ``llama_small``, ``llama_tiny``, ``gpt2s``, ``smollm2``,
    ``llama70b`` (headers and holes) or ``wide_...`` (few layers as wide as a 7B's), made if need be. RuntimeError
    if what ``smollm2`` is made from is missing."""
    directory = CACHE / work
    if (directory / "config.json").exists():
        return directory
    if work == "smollm2":
        return _smollm2()
    importable()
    staged = CACHE / f"{work}.{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    if work == "llama70b":
        _llama_70b(staged)
    elif work in _REPEATED:
        _repeated(staged, *_REPEATED[work])
    else:
        _random(staged, *_RANDOM[work])
    staged.rename(directory)
    return directory


_RANDOM: dict[str, tuple[dict[str, Any], str]] = {  # configuration and size of a shard
    "llama1b": (LLAMA_1B, "500MB"),
    "llama8b": (LLAMA_8B, "5GB"),
    "llama_small": (LLAMA_SMALL, "5GB"),
    "llama_tiny": (LLAMA_TINY, "5GB"),
    "gpt2s": (GPT2_SMALL, "5GB"),
}


_REPEATED: dict[str, tuple[str, int, int]] = {  # dtype, layers, shards
    "wide_bf16": ("bfloat16", 2, 1),
    "wide_fp32": ("float32", 1, 1),
    "wide_shards": ("bfloat16", 4, 40),
}


def _smollm2() -> Path:
    """As the tests make it; from its file, as the repository's root may not be importable."""
    spec = util.spec_from_file_location("smollm2", ROOT / "tests" / "smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    smollm2 = util.module_from_spec(spec)
    spec.loader.exec_module(smollm2)
    return Path(smollm2.smollm2_directory())


def _random(directory: Path, config: dict[str, Any], max_shard_size: str) -> None:
    import torch

    from loadstone import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = dict(config)
    built = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(built).save_pretrained(directory, max_shard_size=max_shard_size)


def _llama_70b(directory: Path) -> None:
    """30 shards whose headers are real and whose data is a hole: 141 GB that take no room."""
    _shards(directory, {**LLAMA_70B}, 30, None)


def _repeated(directory: Path, dtype: str, layers: int, shards: int) -> None:
    """Layers of Llama-2-7B's shape, written at the speed of the disk: all weights are one block of random numbers."""
    import torch

    torch.manual_seed(0)
    block = torch.randn(4 << 20).mul_(0.02).to(getattr(torch, dtype)).view(torch.uint8)
    values = {**LLAMA_7B, "dtype": dtype, "num_hidden_layers": layers}
    _shards(directory, values, shards, block.numpy().tobytes())


def _shards(directory: Path, values: dict[str, Any], count: int, block: bytes | None) -> None:
    """A Llama's shards with real headers; data is ``block`` again and again, None: a hole."""
    import torch

    from loadstone import AutoConfig
    from loadstone.loading.writer import DTYPE_NAMES
    from loadstone.models.llama import LlamaForCausalLM
    from loadstone.models.pretrained import build_on_meta

    fields = dict(values)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    dtype = getattr(torch, values["dtype"])
    tensors = [(name, list(p.shape)) for name, p in build_on_meta(LlamaForCausalLM, config).state_dict().items()]
    per_shard = math.ceil(len(tensors) / count)
    weight_map, total = {}, 0
    groups = [tensors[begin : begin + per_shard] for begin in range(0, len(tensors), per_shard)]
    for number, group in enumerate(groups):
        name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" if count > 1 else "model.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, shape in group:
            size = math.prod(shape) * dtype.itemsize
            header[tensor] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [end, end + size]}
            end += size
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / name, "wb") as shard:
            shard.write(struct.pack("<Q", len(text)) + text)
            for begin in range(0, end if block else 0, len(block or b" ")):
                shard.write(block[: end - begin])  # type: ignore[index]
            shard.truncate(8 + len(text) + end)
        total += end
    if count > 1:
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(index_text)
    (directory / "config.json").write_text(json.dumps(values))
