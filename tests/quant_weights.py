"""Weights that are hard to quantize, and what is the same about two quantizations."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from loadstone.quant.codebooks import QUANT_TYPES, boundaries
from loadstone.quant.quant_state import BLOCK_SIZES, DTYPES

FLOATS = tuple(DTYPES.values())
KINDS = ("normal", "bounds", "tiny", "huge", "zeros", "even", "spread")


def weight(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A finite tensor. "bounds": on the bounds between codes and next to them. "tiny": subnormals. "huge": up to the
    largest number. "zeros": whole blocks of them. "even": all magnitudes alike. "spread": many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    largest = torch.finfo(dtype).max
    if kind == "bounds":
        near = torch.cat([boundaries(quant_type)[0] for quant_type in QUANT_TYPES])
        x = near[torch.randint(len(near), shape, generator=generator)]
        x = torch.nextafter(x, x + torch.randint(-1, 2, shape, generator=generator))
        x = x.where(torch.rand(shape, generator=generator) > 0.1, 1.0)
        x = x * 2.0 ** float(torch.randint(-4, 4, (), generator=generator))
    elif kind == "tiny":
        x = x * float(torch.finfo(dtype).smallest_normal) * 2.0 ** float(torch.randint(-8, 2, (), generator=generator))
    elif kind == "huge":
        x = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).mul(largest)
    elif kind == "zeros":
        x = x * (torch.arange(x.numel()) // 50 % 2).view(shape)
    elif kind == "even":
        x = x.sign() * 0.37
    elif kind == "spread":
        x = x * 10.0 ** torch.empty(shape).uniform_(-6, 3, generator=generator)
    return x.double().clamp(-largest, largest).to(dtype)


shapes = st.one_of(
    st.tuples(st.integers(1, 700)),
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
    st.tuples(st.integers(1, 9), st.sampled_from((32, 64, 128, 512))),
    st.sampled_from(((130, 64), (3, 4096), (257, 128), (2, 3, 35))),
)
matrices = st.tuples(st.integers(1, 40), st.integers(1, 300))
weights = st.builds(weight, st.sampled_from(KINDS), shapes, st.sampled_from(FLOATS), st.integers(0, 1000))
options = st.fixed_dictionaries(
    {
        "quant_type": st.sampled_from(QUANT_TYPES),
        "blocksize": st.sampled_from(BLOCK_SIZES),
        "double_quant": st.booleans(),
    }
)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike in dtype, shape and every bit: -0 is not 0."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(raw(one), raw(other))


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def to_json(tensor: Tensor) -> dict[str, Any]:
    """A tensor for a file of frozen vectors."""
    data = base64.b64encode(bytes(raw(tensor).tolist())).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": data}


def from_json(entry: Mapping[str, Any]) -> Tensor:
    """The tensor that `to_json` was given."""
    flat = torch.frombuffer(bytearray(base64.b64decode(entry["data"])), dtype=torch.uint8)
    return flat.view(getattr(torch, entry["dtype"])).view(entry["shape"])
