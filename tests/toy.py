"""A toy language model and checkpoints of it, for tests of the loading floor: no architecture of ours is involved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from loadstone.loading.checkpoint import Checkpoint, open_checkpoint
from loadstone.loading.load import load_into
from loadstone.loading.source import resolve_source

VOCAB, WIDTH, LAYERS = 11, 8, 12
TIES = {"lm_head.weight": "model.embed.weight"}


class Bag(nn.Module):
    """Parameters of any names, shapes and dtypes, on meta."""

    def __init__(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            empty = torch.empty(tensor.shape, dtype=wanted, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=empty.is_floating_point()))


class Rope(nn.Module):
    """Owns a buffer that is recomputed, never loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(4), persistent=False)

    def reset_buffers(self, device: torch.device) -> None:
        self.inv_freq = torch.arange(4, dtype=torch.float32, device=device) / 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.rotary_emb = Rope()
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.register_buffer("scale", torch.ones(3))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Base()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)


def meta(dtype: torch.dtype = torch.float32, kind: type[nn.Module] = Toy) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        model = kind()
    for slot in [*model.parameters(), *[buffer for name, buffer in model.named_buffers() if "inv_freq" not in name]]:
        slot.data = slot.data.to(dtype)
    return model


def quantized(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model without weights, its linear layers packed as `BitsAndBytesConfig` says, but for the head."""
    from loadstone import BitsAndBytesConfig
    from loadstone.quant.registry import find_quantizer

    model = meta(dtype)
    find_quantizer("toy", None, BitsAndBytesConfig(**options, llm_int8_skip_modules=["lm_head"])).replace(model)
    return model


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights under the model's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype) for name, tensor in meta().state_dict().items()
    }


def save(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **index: Any) -> Path:
    """Write a checkpoint; ``index`` overrides entries of the index file."""
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map, **index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    return directory


def opened(directory: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(resolve_source(directory), **options)


def initialize(module: nn.Module) -> None:
    """An architecture's initialiser: ones for norms, a constant for the rest."""
    for name, parameter in module.named_parameters(recurse=False):
        parameter.fill_(1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.25)
    for _name, buffer in module.named_buffers(recurse=False):
        buffer.fill_(0.5)


def load(directory: Path, model: nn.Module | None = None, **options: Any) -> tuple[Any, Any]:
    """Model and report of loading what ``directory`` holds."""
    model = meta() if model is None else model
    report = load_into(model, opened(directory), **{"initialize": initialize, **options})
    return model, report


def same(model: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a model's state dict equals the tensors, bit for bit."""
    state = model.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)
