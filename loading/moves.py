"""One tensor's way from a file to the model, as a plan has it, and what keeps one from going."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from .header import TensorEntry

if TYPE_CHECKING:
    from ..quant import Recipe


class Packing(NamedTuple):
    """What becomes of a floating-point tensor that is quantized: ``makes`` maps the packed layer's attributes to names
    of weights, ``nbytes`` is what they take together."""

    recipe: Recipe
    makes: dict[str, str]
    nbytes: int


class Move(NamedTuple):
    """One tensor's way from a file to the model.

    ``transform``: ``"map"`` (its bytes are mapped privately, nothing is read), ``"cast"`` (to ``dtype``), ``"copy"``
    (same dtype, but to another device, or not aligned in the file), ``"quantize"`` (it becomes the tensors of
    ``packing``), ``"disk"`` (mapped in the file's own dtype, and cast when used if ``dtype`` is another) or ``"none"``
    (stays on meta).
    """

    target: str
    entry: TensorEntry
    device: torch.device
    dtype: torch.dtype
    transform: str
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes at the destination."""
        if self.packing is not None:
            return self.packing.nbytes
        if self.transform == "disk":
            return self.entry.nbytes
        return self.entry.nbytes // self.entry.dtype.itemsize * self.dtype.itemsize


class Mismatch(NamedTuple):
    """A checkpoint tensor whose shape is not the model's."""

    name: str
    file: Path
    checkpoint_shape: tuple[int, ...]
    model_shape: tuple[int, ...]
    key: str

    def __str__(self) -> str:
        tensor = f"tensor {self.key!r}" + (f" (the model's {self.name!r})" if self.key != self.name else "")
        return f"{tensor} in {self.file.name} has shape {self.checkpoint_shape}, the model expects {self.model_shape}"
