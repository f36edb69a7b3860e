"""Norms over the last axis, alone and with the residual add in front of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dispatch import AUTO, Kernels, declare, dispatch


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float, *, kernels: Kernels = AUTO) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), as Llama checkpoints were trained.

    hidden_states: (..., hidden_size), any float dtype; statistics in fp32. The normalised value is rounded to the
    input dtype before ``weight`` (hidden_size,) multiplies it; the result has the dtype that the two promote to. The
    backward pass keeps the input and one number per row, and can be differentiated once.
    """
    return dispatch(kernels, "rms_norm", hidden_states, weight, eps)


def add_rms_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, eps: float, *, kernels: Kernels = AUTO
) -> tuple[Tensor, Tensor]:
    """(rms_norm(hidden_states + residual), hidden_states + residual), the sum rounded to the dtype the two promote to.

    hidden_states, residual: (..., hidden_size). weight: (hidden_size,).
    """
    return dispatch(kernels, "add_rms_norm", hidden_states, residual, weight, eps)


def layer_norm(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, kernels: Kernels = AUTO
) -> Tensor:
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) over the last axis; statistics in fp32.

    hidden_states: (..., hidden_size). weight, bias: (hidden_size,), bias may be None. Result in the input's dtype.
    """
    return dispatch(kernels, "layer_norm", hidden_states, weight, bias, eps)


def add_layer_norm(
    hidden_states: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    kernels: Kernels = AUTO,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(hidden_states + residual), hidden_states + residual); shapes as for `add_rms_norm`."""
    return dispatch(kernels, "add_layer_norm", hidden_states, residual, weight, bias, eps)


def _torch_rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(hidden_states, weight, eps)[0]
    if hidden_states.dtype == weight.dtype == torch.float32:  # one kernel; nothing is rounded in between
        return F.rms_norm(hidden_states, weight.shape, weight, eps)
    return weight * _normalise(hidden_states, _inverse_rms(hidden_states, eps))


def _torch_add_rms_norm(hidden_states: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = hidden_states + residual
    return _torch_rms_norm(total, weight, eps), total


def _torch_layer_norm(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(hidden_states, weight.shape, weight, bias, eps)


def _torch_add_layer_norm(
    hidden_states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = hidden_states + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


declare("rms_norm", _torch_rms_norm, "norm")
declare("add_rms_norm", _torch_add_rms_norm, "norm")
declare("layer_norm", _torch_layer_norm, "norm")
declare("add_layer_norm", _torch_add_layer_norm, "norm")


def _inverse_rms(hidden_states: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(hidden_states.float().square().mean(-1, keepdim=True).add_(eps))


def _normalise(hidden_states: Tensor, inverse_rms: Tensor) -> Tensor:
    return (hidden_states.float() * inverse_rms).to(hidden_states.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(hidden_states: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse_rms = _inverse_rms(hidden_states, eps)
        return weight * _normalise(hidden_states, inverse_rms), inverse_rms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], inputs[1], output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_states, weight, inverse_rms = ctx.saved_tensors
        normed = hidden_states.float() * inverse_rms
        grad_input = grad_weight = None
        if ctx.needs_input_grad[1]:
            rounded = normed.to(hidden_states.dtype)
            grad_weight = (grad * rounded).reshape(-1, weight.shape[0]).sum(0, dtype=torch.float32).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            scaled = (grad * weight).float()
            along = (scaled * normed).mean(-1, keepdim=True)
            grad_input = scaled.addcmul_(normed, along, value=-1).mul_(inverse_rms).to(hidden_states.dtype)
        return grad_input, grad_weight, None
