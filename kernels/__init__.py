"""Floor 1, how fast: tensor functions and one dispatch. Tensors in, tensors out; no modules, no configurations."""

from .activation import activation, activation_names, gated
from .attention import (
    AttentionFunction,
    attention,
    attention_names,
    attention_unavailable,
    check_attention,
    register_attention,
    returns_weights,
)
from .dispatch import AUTO, Kernels, kernel_names, operations, register_kernel
from .flash import flash_attention, flash_attention_varlen
from .linear_cross_entropy import linear_cross_entropy
from .loss import causal_lm_loss
from .mask import AttentionMask
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .rotary import apply_rotary

__all__ = [
    "AUTO",
    "AttentionFunction",
    "AttentionMask",
    "Kernels",
    "activation",
    "activation_names",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary",
    "attention",
    "attention_names",
    "attention_unavailable",
    "causal_lm_loss",
    "check_attention",
    "flash_attention",
    "flash_attention_varlen",
    "gated",
    "kernel_names",
    "layer_norm",
    "linear_cross_entropy",
    "operations",
    "register_attention",
    "register_kernel",
    "returns_weights",
    "rms_norm",
]
