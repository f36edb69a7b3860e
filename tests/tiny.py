"""Tiny models and checkpoints of the three architectures, made without any of the code that saves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from safetensors.torch import save_file
from torch import nn

from loadstone import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
)

KINDS = ("llama", "mistral", "gpt2")
CONFIGS: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig, "gpt2": GPT2Config}
MODELS: dict[str, Any] = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "gpt2": GPT2LMHeadModel}

_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_VALUES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
             "eos_token_id": 0},
}  # fmt: skip


def values(kind: str, **overrides: Any) -> dict[str, Any]:
    """The contents of a small config.json."""
    return {"model_type": kind, **_VALUES[kind], **overrides}


def randomize(model: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Weights large enough that attention is far from uniform and that norms and biases matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_scale else noise)


def model(kind: str, seed: int = 0, attn_implementation: str = "eager", **overrides: Any) -> Any:
    """A randomised model in evaluation mode."""
    config = CONFIGS[kind].from_dict(values(kind, **overrides), attn_implementation=attn_implementation)
    built = MODELS[kind](config).eval()
    randomize(built, seed)
    return built


def checkpoint(directory: Path, kind: str, seed: int = 0, stored: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Write config.json and model.safetensors of a small model; returns the model."""
    built = model(kind, seed, **overrides).to(stored)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values(kind, **overrides)))
    tied = set(built.active_ties())
    tensors = {name: t.detach().clone() for name, t in built.state_dict().items() if name not in tied}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return built


def examples(count: int) -> settings:
    """Hypothesis settings for ``count`` examples, ten times as many under HYPOTHESIS_PROFILE=thorough."""
    thorough = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
    return settings(max_examples=count * 10 if thorough else count)
