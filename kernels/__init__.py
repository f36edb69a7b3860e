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
from .loss import causal_lm_loss
from .mask import AttentionMask
from .norm import rms_norm
from .rotary import apply_rotary

__all__ = [
    "AttentionFunction",
    "AttentionMask",
    "activation",
    "activation_names",
    "apply_rotary",
    "attention",
    "attention_names",
    "causal_lm_loss",
    "check_attention",
    "gated",
    "register_attention",
    "returns_weights",
    "rms_norm",
]
