"""The gate of a GLU in Triton: activation and product in one pass; differentiable once.

Both fused activations are x * sigmoid(z): z = x for SiLU, and for GELU's tanh form (Hendrycks & Gimpel 2016,
arXiv:1606.08415) z = 2 sqrt(2/pi) (x + 0.044715 x^3), since (1 + tanh u) / 2 = sigmoid(2u).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from ..tuning import blocks
from .launch import launch
from .rows import as_rows, refused_dtype

_IS_GELU = {
    "silu": False, "swish": False,
    "gelu_fast": True, "gelu_new": True, "gelu_python_tanh": True, "gelu_pytorch_tanh": True,
}  # fmt: skip

_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid_and_slope(x, GELU: tl.constexpr):
    """sigmoid(z) and dz/dx."""
    if GELU:
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)  # beyond, the sigmoid is 0 or 1; the cube would overflow
        square = near * near
        return tl.sigmoid(near * (square * _CUBIC + 1.0) * _SLOPE), (square * (3.0 * _CUBIC) + 1.0) * _SLOPE
    else:
        return tl.sigmoid(x), x * 0.0 + 1.0


@triton.jit
def _place(columns, blocks_a_row, BLOCK: tl.constexpr):
    """The program's row, its columns, and which of these there are."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks_a_row
    place = (program - row * blocks_a_row) * BLOCK + tl.arange(0, BLOCK)
    return row, place, place < columns


@triton.jit(do_not_specialize=["blocks_a_row"])
def gate_forward(
    Gate, Up, Out, stride_gate, stride_up, columns, blocks_a_row, GELU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, place, real = _place(columns, blocks_a_row, BLOCK)
    gate = tl.load(Gate + row * stride_gate + place, mask=real, other=0.0).to(tl.float32)
    up = tl.load(Up + row * stride_up + place, mask=real, other=0.0).to(tl.float32)
    sigmoid, _ = _sigmoid_and_slope(gate, GELU)
    active = (gate * sigmoid).to(Out.dtype.element_ty).to(tl.float32)
    tl.store(Out + row * columns + place, (active * up).to(Out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["blocks_a_row"])
def gate_backward(
    Grad, Gate, Up, GradGate, GradUp, stride_grad, stride_gate, stride_up, columns, blocks_a_row,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, place, real = _place(columns, blocks_a_row, BLOCK)
    grad = tl.load(Grad + row * stride_grad + place, mask=real, other=0.0).to(tl.float32)
    gate = tl.load(Gate + row * stride_gate + place, mask=real, other=0.0).to(tl.float32)
    up = tl.load(Up + row * stride_up + place, mask=real, other=0.0).to(tl.float32)
    sigmoid, slope = _sigmoid_and_slope(gate, GELU)
    active = (gate * sigmoid).to(GradUp.dtype.element_ty).to(tl.float32)
    derivative = sigmoid + gate * sigmoid * (1.0 - sigmoid) * slope
    tl.store(GradGate + row * columns + place, (grad * up * derivative).to(GradGate.dtype.element_ty), mask=real)
    tl.store(GradUp + row * columns + place, (grad * active).to(GradUp.dtype.element_ty), mask=real)


def gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """The operation of that name. The activation is rounded to the inputs' dtype before it multiplies, as in torch."""
    return _forward(gate, up, _IS_GELU[name])


def supports_gated(gate: Tensor, up: Tensor, name: str) -> str | None:
    """Why Triton's gate cannot take these, None if it can."""
    if name not in _IS_GELU:
        return f"it has {', '.join(_IS_GELU)}, not {name!r}"
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return (
            f"it takes a gate and an up of one shape and dtype, not {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
    return refused_dtype(gate)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as rows of one length: a single row where all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.reshape(1, tensor.numel()) for tensor in tensors]
    return [as_rows(tensor) for tensor in tensors]


def _launch(kernel: Any, inputs: list[Tensor], outputs: list[Tensor], gelu: bool) -> None:
    rows, columns = inputs[0].shape
    sizes = blocks("gate", "any", inputs[0].device)
    blocks_a_row = triton.cdiv(columns, sizes["BLOCK"])
    strides = [tensor.stride(0) for tensor in inputs]
    launch(kernel, (rows * blocks_a_row,), *inputs, *outputs, *strides, columns, blocks_a_row, GELU=gelu, **sizes)


def _triton_gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    out = gate.new_empty(gate.shape)
    _launch(gate_forward, _flat(gate, up), [out], gelu)
    return out


def _fake_gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return gate.new_empty(gate.shape)


def _triton_backward(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    outputs = [gate.new_empty(gate.shape), gate.new_empty(gate.shape)]
    _launch(gate_backward, _flat(grad, gate, up), outputs, gelu)
    return outputs[0], outputs[1]


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


@once_differentiable
def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_backward(grad, *ctx.saved_tensors, ctx.gelu), None)


_backward = define("gated_backward", _triton_backward, _fake_backward)
_forward = define("gated", _triton_gated, _fake_gated, backward=_gradients, setup_context=_save)
