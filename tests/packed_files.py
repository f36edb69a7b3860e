"""Writers of GPTQ and AWQ checkpoints, from the formats' definitions, number by number: what the readers must undo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def stream_of_bits(numbers: Tensor, bits: int) -> Tensor:
    """Rows of whole numbers → rows of int32 words: each number's bits follow the last one's, from low to high."""
    words = []
    for row in numbers.tolist():
        value = sum(number << (bits * place) for place, number in enumerate(row))
        words.append([(value >> (32 * word)) & 0xFFFFFFFF for word in range(len(row) * bits // 32)])
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def grouped(
    shape: tuple[int, int], groups: Tensor, bits: int, seed: int, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random codes (out, in), zeros and scales (groups, out), and the weight (out, in) fp64 that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    out, inputs = shape
    count = int(groups.max()) + 1
    codes = torch.randint(0, 1 << bits, (out, inputs), generator=generator)
    zeros = torch.randint(1, 1 << bits, (count, out), generator=generator)
    scales = (torch.rand(count, out, generator=generator) * 0.1 + 0.01).to(scale_dtype)
    weight = (codes - zeros.t()[:, groups]).double() * scales.double().t()[:, groups]
    return {"codes": codes, "zeros": zeros, "scales": scales, "weight": weight}


def gptq(shape: tuple[int, int], *, bits: int, group_size: int, desc_act: bool, form: str, seed: int,
         scale_dtype: torch.dtype = torch.float16) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """(tensors of a layer, the weight)."""
    size = shape[1] if group_size == -1 else group_size
    groups = torch.arange(shape[1]) // size
    if desc_act:
        groups = groups[torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))]
    parts = grouped(shape, groups, bits, seed, scale_dtype)
    stored = parts["zeros"] - (1 if form == "gptq" else 0)
    tensors = {
        "qweight": stream_of_bits(parts["codes"], bits).t().contiguous(),
        "qzeros": stream_of_bits(stored, bits),
        "scales": parts["scales"],
        "g_idx": groups.to(torch.int32),
    }
    return tensors, parts["weight"]


def awq(shape: tuple[int, int], *, group_size: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors of a layer, the weight)."""
    size = shape[1] if group_size == -1 else group_size
    parts = grouped(shape, torch.arange(shape[1]) // size, 4, seed, torch.float16)

    def packed(numbers: Tensor) -> Tensor:
        order = torch.tensor([8 * word + one for word in range(shape[0] // 8) for one in AWQ_ORDER])
        return stream_of_bits(numbers[:, order], 4)

    tensors = {"qweight": packed(parts["codes"].t()), "qzeros": packed(parts["zeros"]), "scales": parts["scales"]}
    return tensors, parts["weight"]


def checkpoint(directory: Path, kind: str, config: dict[str, Any], pack: Any, **overrides: Any) -> dict[str, Tensor]:
    """A checkpoint whose linear layers but the head are packed: ``pack(shape, seed)`` makes one; {layer: weight}."""
    model = tiny.model(kind, **overrides)
    tensors = dict(model.state_dict())
    for name in model.active_ties():
        del tensors[name]
    weights: dict[str, Tensor] = {}
    for seed, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            del tensors[f"{name}.weight"]
            parts, weights[name] = pack(tuple(layer.weight.shape), seed)
            tensors |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
    write(directory, kind, config, tensors, **overrides)
    return weights


def write(directory: Path, kind: str, config: dict[str, Any], tensors: dict[str, Tensor], **overrides: Any) -> None:
    """config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    values = tiny.values(kind, **overrides, quantization_config=config)
    (directory / "config.json").write_text(json.dumps(values))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
