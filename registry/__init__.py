"""Floor 5, which class: model_type → (configuration, model), lazily, with plug-ins."""

from .auto import AutoConfig, AutoModelForCausalLM
from .table import Architecture, list_architectures, register, register_causal_lm

__all__ = [
    "Architecture",
    "AutoConfig",
    "AutoModelForCausalLM",
    "list_architectures",
    "register",
    "register_causal_lm",
]
