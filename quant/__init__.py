"""Floor 2, in what form weights are held.

This version holds weights in floating point only. A checkpoint that declares a quantization, or a caller who asks for
one, is refused here with a clear error: loading packed bytes as if they were numbers would give a model that runs and
talks nonsense.
"""

from .declared import declared_method, refuse_quantized

__all__ = ["declared_method", "refuse_quantized"]
