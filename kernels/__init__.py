"""Floor 1, how fast: tensor functions and one dispatch. Tensors in, tensors out; no modules, no configurations."""

from .activation import activation, activation_names, gated
from .attention import (
    AttentionFunction,
    attention,
    attention_names,
    check_attention,
    register_attention,
    returns_weights,
)
from .dispatch import AUTO, Kernels, kernel_names, operations, register_kernel
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
    "causal_lm_loss",
    "check_attention",
    "gated",
    "kernel_names",
    "layer_norm",
    "operations",
    "register_attention",
    "register_kernel",
    "returns_weights",
    "rms_norm",
]
