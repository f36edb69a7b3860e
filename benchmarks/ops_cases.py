"""The fused operations as cases of a race: inputs, our call, the same written out, and Liger-Kernel's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import harness

harness.importable()

from loadstone import kernels  # noqa: E402

EPS = 1e-6
Function = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """One operation.

    inputs: makes the differentiable inputs and the others. ours, eager, liger: called with all of them; liger None
        where Liger-Kernel has none. forward, backward: how many tensors of ``unit`` bytes must move in each, 0 where
        matrix products set the limit.
    """

    name: str
    inputs: Callable[[Place], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    ours: Function
    eager: Function
    liger: Callable[[], Function] | None = None
    forward: int = 0
    backward: int = 0

    def unit(self, differentiable: tuple[Tensor, ...]) -> int:
        """Bytes of one tensor of the size that the operation moves: rotary's is query and key together."""
        tensors = differentiable if self.name == "apply_rotary" else differentiable[:1]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def moved(self, differentiable: tuple[Tensor, ...], backward: bool) -> int:
        """Bytes that must move, at least."""
        return self.unit(differentiable) * (self.forward + (self.backward if backward else 0))


@dataclass(frozen=True)
class Place:
    """A device and the sizes that suit it."""

    device: torch.device
    quick: bool = False

    def size(self, gpu: int, cpu: int, quick: int) -> int:
        """One of the three."""
        return quick if self.quick else gpu if self.device.type == "cuda" else cpu

    def drawn(self, *shape: int, grad: bool = True, scale: float = 1.0) -> Tensor:
        """Random numbers in the dtype of the race: bf16 on a GPU, fp32 on a CPU."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return (torch.randn(shape, device=self.device, dtype=dtype) * scale).requires_grad_(grad)


def _rms_norm(hidden_states: Tensor, weight: Tensor) -> Tensor:
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(hidden_states.dtype)


def _add_rms_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = hidden_states + residual
    return _rms_norm(total, weight), total


def _layer_norm(hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(hidden_states, weight.shape, weight, bias, EPS)


def _add_layer_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = hidden_states + residual
    return _layer_norm(total, weight, bias), total


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return query * cos + _rotate_half(query) * sin, key * cos + _rotate_half(key) * sin


def _our_rotary(query: Tensor, key: Tensor, cos: Tensor, _: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.apply_rotary(query, key, cos, signed)


def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _linear_cross_entropy(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_states, weight).float(), labels)


def _hidden(place: Place) -> tuple[int, int]:
    return place.size(16384, 2048, 16), place.size(4096, 2048, 64)


def _norm_inputs(vectors: int, residual: bool) -> Callable[[Place], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    def make(place: Place) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        tokens, size = _hidden(place)
        wide = tuple(place.drawn(tokens, size) for _ in range(2 if residual else 1))
        return (*wide, *(place.drawn(size) for _ in range(vectors))), ()

    return make


def _rotary_inputs(place: Place) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As a model has them: views of (batch, seq, heads, head_dim); cosines, sines, and the sines as ours takes them,
    the first half negated, which models prepare once for all layers."""
    batch, length, dim = place.size(4, 1, 1), place.size(4096, 2048, 16), place.size(128, 64, 16)
    query, key = (
        place.drawn(batch, length, heads, dim, grad=False).transpose(1, 2).requires_grad_() for heads in (32, 8)
    )
    angles = torch.rand(1, 1, length, dim // 2, device=place.device).repeat(1, 1, 1, 2) * 6
    cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
    return (query, key), (cos, sin, torch.cat((-sin[..., : dim // 2], sin[..., dim // 2 :]), -1))


def _gate_inputs(place: Place) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    tokens, size = place.size(16384, 2048, 16), place.size(14336, 5632, 64)
    return (place.drawn(tokens, size), place.drawn(tokens, size)), ()


def _loss_inputs(place: Place) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    tokens, size, vocabulary = place.size(16384, 2048, 64), place.size(4096, 256, 32), place.size(128256, 128256, 512)
    hidden_states, weight = place.drawn(tokens, size), place.drawn(vocabulary, size, scale=size**-0.5)
    return (hidden_states, weight), (torch.randint(0, vocabulary, (tokens,), device=place.device),)


def _ours_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return kernels.linear_cross_entropy(hidden_states, weight, shift_labels=labels)


def _liger_norm() -> Function:
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda hidden_states, weight: function.apply(hidden_states, weight, EPS, 0.0, "llama", False)


def _liger_layer_norm() -> Function:
    function = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda hidden_states, weight, bias: function.apply(hidden_states, weight, bias, EPS)


def _liger_rotary() -> Function:
    function = import_module("liger_kernel.ops.rope").LigerRopeFunction
    # It rotates in place: what a model would not see again is copied first, so that every call gets the same.
    return lambda query, key, cos, sin, _: function.apply(query.clone(), key.clone(), cos[0], sin[0])


def _liger_silu() -> Function:
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda gate, up: function.apply(gate, up)


def _liger_gelu() -> Function:
    function = import_module("liger_kernel.ops.geglu").LigerGELUMulFunction
    return lambda gate, up: function.apply(gate, up)


def _liger_loss() -> Function:
    loss = import_module("liger_kernel.transformers.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden_states, weight, labels: loss(weight, hidden_states, labels)


OPERATIONS = (
    Operation(
        "rms_norm", _norm_inputs(1, False), lambda h, w: kernels.rms_norm(h, w, EPS), _rms_norm, _liger_norm, 2, 3
    ),
    Operation(
        "add_rms_norm", _norm_inputs(1, True), lambda h, r, w: kernels.add_rms_norm(h, r, w, EPS), _add_rms_norm, None,
        4, 4,
    ),
    Operation(
        "layer_norm", _norm_inputs(2, False), lambda h, w, b: kernels.layer_norm(h, w, b, EPS), _layer_norm,
        _liger_layer_norm, 2, 3,
    ),
    Operation(
        "add_layer_norm", _norm_inputs(2, True), lambda h, r, w, b: kernels.add_layer_norm(h, r, w, b, EPS),
        _add_layer_norm, None, 4, 4,
    ),
    Operation("apply_rotary", _rotary_inputs, _our_rotary, _rotary, _liger_rotary, 2, 2),
    Operation("gated silu", _gate_inputs, lambda g, u: kernels.gated("silu", g, u), _silu_gate, _liger_silu, 3, 5),
    Operation(
        "gated gelu", _gate_inputs, lambda g, u: kernels.gated("gelu_pytorch_tanh", g, u), _gelu_gate, _liger_gelu, 3, 5
    ),
    Operation("linear_cross_entropy", _loss_inputs, _ours_loss, _linear_cross_entropy, _liger_loss),
)  # fmt: skip
BY_NAME = {operation.name: operation for operation in OPERATIONS}


def sides(operation: Operation, on_gpu: bool) -> dict[str, Callable[[], Function]]:
    """{side: makes its function}, ours first."""
    made: dict[str, Callable[[], Function]] = {
        "loadstone": lambda: operation.ours,
        "eager": lambda: operation.eager,
        "torch.compile": lambda: torch.compile(operation.eager, fullgraph=True, dynamic=False),
    }
    if on_gpu and operation.liger is not None and util.find_spec("liger_kernel") is not None:
        made["liger"] = operation.liger
    return made
