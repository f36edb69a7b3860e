"""Checkpoints of any size whose tensors are holes in their files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch

import loadstone
from loadstone.models.pretrained import build_on_meta


def sparse_checkpoint(directory: Path, config: Any, shards: int) -> None:
    """Write a Llama's checkpoint in bfloat16, all zeros, that takes next to no room."""
    shapes = {
        name: tuple(t.shape) for name, t in build_on_meta(loadstone.LlamaForCausalLM, config).state_dict().items()
    }
    names = list(shapes)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for name in names[len(names) * shard // shards : len(names) * (shard + 1) // shards]:
            end = offset + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (directory / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(directory / file, 8 + len(text) + offset)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(config.to_json_string())


def llama_70b() -> Any:
    """The configuration of Llama 3 70B: 70,553,706,496 parameters."""
    return loadstone.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
