"""Text generation: options as data, the loop that feeds the model, and the ways to choose tokens."""

from .configuration import GenerationConfig
from .generate import generate
from .output import GenerateOutput

__all__ = ["GenerateOutput", "GenerationConfig", "generate"]
