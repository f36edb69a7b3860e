"""The calls that a search times: one for each kernel and class of shapes of the block tables, of realistic sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .activation import gated
from .dispatch import Kernels
from .eight_bit import linear_int8
from .flash import flash_attention
from .four_bit import dequantize_4bit, linear_4bit
from .norm import add_rms_norm
from .rotary import apply_rotary
from .tuning import generation

_TRITON = Kernels("triton")


@dataclass(frozen=True)
class Call:
    """A real call that launches a kernel.

    run: makes it, and returns the tensors it computes, the same every time. most: the largest useful value of a size.
    """

    run: Callable[[], tuple[Tensor, ...]]
    most: Mapping[str, int] = field(default_factory=dict)


def call_of(kernel: str, shape_class: str, device: torch.device) -> Call:
    """The call for a kernel of the tables. Raises KeyError for a kernel without one.

    In Triton's interpreter the same call over small tensors of fp16, whose products it computes rightly.
    """
    return _MAKERS[kernel](shape_class, _Place(device, generation(device) == "interpreter"))


class _Place:
    """Where the call runs, whether it is small, and its random numbers."""

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.small = device, small
        self.generator = torch.Generator(device).manual_seed(0)

    def size(self, usual: int, small: int) -> int:
        return small if self.small else usual

    def dtype(self, bits: str = "16") -> torch.dtype:
        return torch.float32 if bits == "32" else torch.float16 if self.small else torch.bfloat16

    def random(self, *shape: int, bits: str = "16", grad: bool = False) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.to(self.dtype(bits)).requires_grad_(grad)


def _attention(shape_class: str, place: _Place, queries: int, keys: int, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of grouped heads, hidden size 2048."""
    dim, bits = shape_class.removeprefix("d").split("-")
    kv_heads = place.size(max(1, 512 // int(dim)), 1)
    heads = place.size(4, 2) * kv_heads
    batch = place.size(2 if queries > 1 else 8, 1)
    return (
        place.random(batch, heads, queries, int(dim), bits=bits, grad=grad),
        place.random(batch, kv_heads, keys, int(dim), bits=bits, grad=grad),
        place.random(batch, kv_heads, keys, int(dim), bits=bits, grad=grad),
    )


def _flash_forward(shape_class: str, place: _Place) -> Call:
    length = place.size(4096, 70)
    query, key, value = _attention(shape_class, place, length, length, grad=False)
    return Call(lambda: (flash_attention(query, key, value, causal=True, kernels=_TRITON),))


def _flash_backward(shape_class: str, place: _Place) -> Call:
    length = place.size(4096, 70)
    inputs = _attention(shape_class, place, length, length, grad=True)
    return _backward_call(flash_attention(*inputs, causal=True, kernels=_TRITON), inputs)


def _flash_decode(shape_class: str, place: _Place) -> Call:
    query, key, value = _attention(shape_class, place, 1, place.size(16384, 300), grad=False)
    return Call(lambda: (flash_attention(query, key, value, causal=True, kernels=_TRITON),))


def _backward_call(output: Any, inputs: tuple[Tensor, ...]) -> Call:
    outputs = output if isinstance(output, tuple) else (output,)
    grads = tuple(torch.ones_like(each) for each in outputs)
    return Call(lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True))


def _norm_inputs(hidden_size: int, place: _Place, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens = place.size(max(1024, (1 << 26) // hidden_size), 8)
    hidden_states, residual = (place.random(tokens, hidden_size, grad=grad) for _ in range(2))
    return hidden_states, residual, place.random(hidden_size, grad=grad)


def _norm_size(shape_class: str) -> tuple[int, dict[str, int]]:
    """A hidden size of the class, and what no block need exceed."""
    if shape_class == "long":
        return 32768, {}
    hidden_size = int(shape_class.removeprefix("h"))
    return hidden_size, {"BLOCK_H": hidden_size}


def _norm_forward(shape_class: str, place: _Place) -> Call:
    hidden_size, most = _norm_size(shape_class)
    inputs = _norm_inputs(hidden_size, place, grad=False)
    return Call(lambda: add_rms_norm(*inputs, 1e-6, kernels=_TRITON), most)


def _norm_backward(shape_class: str, place: _Place) -> Call:
    hidden_size, most = _norm_size(shape_class)
    inputs = _norm_inputs(hidden_size, place, grad=True)
    return Call(_backward_call(add_rms_norm(*inputs, 1e-6, kernels=_TRITON), inputs).run, most)


def _norm_weights(_: str, place: _Place) -> Call:
    """Rows that no block holds whole, for which the weight's gradient has a kernel of its own."""
    inputs = _norm_inputs(place.size(32768, 300), place, grad=True)
    return _backward_call(add_rms_norm(*inputs, 1e-6, kernels=_TRITON), inputs)


def _rotary(_: str, place: _Place) -> Call:
    length = place.size(4096, 16)
    query, key = (place.random(place.size(4, 1), place.size(heads, 2), length, 128) for heads in (32, 8))
    cos, sin = (place.random(1, 1, length, 128) for _ in range(2))
    return Call(lambda: apply_rotary(query, key, cos, sin, kernels=_TRITON))


def _gate(_: str, place: _Place) -> Call:
    gate, up = (place.random(place.size(8192, 4), place.size(14336, 300), grad=True) for _ in range(2))
    grad = torch.ones_like(gate)

    def run() -> tuple[Tensor, ...]:
        output = gated("silu", gate, up, kernels=_TRITON)
        return (output.detach(), *torch.autograd.grad(output, (gate, up), grad))

    return Call(run)


def _cross_entropy(_: str, place: _Place) -> Call:
    """The operation that keeps its logits: repeating the chunked one would take the gradients it leaves for logits."""
    tokens, vocabulary = place.size(2048, 4), place.size(128256, 500)
    logits = place.random(tokens, vocabulary, grad=True)
    targets = torch.arange(tokens, device=place.device) * 31 % vocabulary
    operation = import_module(".fused.cross_entropy", __package__).cross_entropy

    def run() -> tuple[Tensor, ...]:
        loss, _ = operation(logits, targets, -100, 0.0, None)
        return (loss.detach(), *torch.autograd.grad(loss, logits))

    return Call(run)


def _four_bit(place: _Place) -> tuple[Any, ...]:
    """(packed, absmax, code, blocksize, shape) of an MLP's weight in blocks of 64."""
    shape = (place.size(4096, 40), place.size(14336, 128))
    count = shape[0] * shape[1]
    packed = torch.randint(256, (count // 2,), generator=place.generator, device=place.device, dtype=torch.uint8)
    absmax = torch.rand(count // 64, generator=place.generator, device=place.device)
    return packed, absmax, torch.linspace(-1, 1, 16, device=place.device), 64, shape


def _decode_4bit(_: str, place: _Place) -> Call:
    packed, absmax, code, blocksize, shape = _four_bit(place)
    dtype = place.dtype()
    return Call(lambda: (dequantize_4bit(packed, absmax, code, blocksize, shape, dtype, kernels=_TRITON),))


def _multiply_4bit(shape_class: str, place: _Place) -> Call:
    parts = _four_bit(place)
    x = place.random(1, parts[-1][1], bits="32" if shape_class == "wide" else "16")
    return Call(lambda: (linear_4bit(x, *parts, kernels=_TRITON),), {"BLOCK_K": parts[3] // 2})


def _multiply_int8(shape_class: str, place: _Place) -> Call:
    rows = 16 if shape_class == "few" else place.size(4096, 40)
    shape = (place.size(4096, 40), place.size(14336, 128))
    weight = torch.randint(-127, 128, shape, generator=place.generator, device=place.device, dtype=torch.int8)
    x, scb = place.random(rows, shape[1]), torch.ones(shape[0], device=place.device)
    return Call(lambda: (linear_int8(x, weight, scb, None, 0.0, kernels=_TRITON),))


_MAKERS: dict[str, Callable[[str, _Place], Call]] = {
    "cross_entropy": _cross_entropy,
    "decode_4bit": _decode_4bit,
    "flash_backward_keys": _flash_backward,
    "flash_backward_queries": _flash_backward,
    "flash_decode": _flash_decode,
    "flash_forward": _flash_forward,
    "gate": _gate,
    "multiply_4bit": _multiply_4bit,
    "multiply_int8": _multiply_int8,
    "norm_backward": _norm_backward,
    "norm_forward": _norm_forward,
    "norm_weights": _norm_weights,
    "rotary": _rotary,
}
