"""LoRA adapters without PEFT, in PEFT's file format."""

from .config import LoraConfig

__all__ = ["LoraConfig"]
