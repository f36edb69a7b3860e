"""Activation functions, by the names that configuration files use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dispatch import AUTO, Kernels, declare, dispatch

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_accurate(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _linear(x: Tensor) -> Tensor:
    return x


_TABLE: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_accurate": _gelu_accurate,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation_names() -> list[str]:
    """Names that `activation` knows."""
    return sorted(_TABLE)


def activation(name: str) -> Activation:
    """The elementwise function called ``name``. Raises KeyError; configurations check the name first."""
    return _TABLE[name]


def gated(name: str, gate: Tensor, up: Tensor, *, kernels: Kernels = AUTO) -> Tensor:
    """``activation(name)(gate) * up``, the gate of a GLU (Shazeer 2020, arXiv:2002.05202).

    gate, up: any shape and float dtype, both the same. Where the gate is fused ("silu", and in Triton the tanh form of
    "gelu" too) the backward pass keeps only the two inputs, and can be differentiated once.
    """
    return dispatch(kernels, "gated", gate, up, name)


def _torch_gated(gate: Tensor, up: Tensor, name: str) -> Tensor:
    if _TABLE[name] is F.silu and torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return _TABLE[name](gate) * up


declare("gated", _torch_gated, "gate")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).mul_(up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)
