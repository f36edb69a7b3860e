"""Weights that the caller holds already: a state dict as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ArgumentError, CheckpointError
from .checkpoint import Checkpoint
from .header import DTYPES, TensorEntry
from .source import Source
from .values import Values

if TYPE_CHECKING:
    from .files import Files

_PLACE = Path("state_dict")  # what messages name in place of a file


class HeldTensor(Values):
    """A tensor in memory; it becomes the weight itself where device and dtype are right."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.home = tensor.device
        self.stored = tensor.numel() * tensor.element_size()

    def ready(self, entry: TensorEntry, files: Files) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True, eq=False)
class NoSource(Source):
    """In place of a directory or repository where there is none: it has no files."""

    def find(self, filename: str) -> Path | None:
        return None

    def fetch(self, filenames: Sequence[str]) -> list[Path]:
        raise ArgumentError(f"state_dict= was given without a checkpoint, so there are no files {list(filenames)}")

    def listing(self) -> list[str]:
        return []

    def describe(self) -> str:
        return "state_dict= without a checkpoint"


def held_checkpoint(state_dict: Any) -> Checkpoint:
    """The checkpoint that a state dict is: its tensors, in its order, none copied.

    Raises ArgumentError if it is no mapping of names to tensors, CheckpointError naming a tensor without values of its
    own (on meta), or of a kind that a weight cannot be (sparse, quantized, nested, a subclass).
    """
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(
            f"state_dict must map names to tensors, not be a {type(state_dict).__name__}; to load files pass their "
            "directory as the first argument"
        )
    entries = {}
    for name, tensor in state_dict.items():
        _check(name, tensor)
        plain = tensor.detach()
        size = plain.numel() * plain.element_size()
        entries[name] = TensorEntry(name, plain.dtype, tuple(plain.shape), _PLACE, -1, size, HeldTensor(plain))
    total = sum(entry.nbytes for entry in entries.values())
    return Checkpoint("state_dict", (), entries, {}, total)


def _check(name: Any, tensor: Any) -> None:
    if not isinstance(name, str):
        raise ArgumentError(f"state_dict has a key {name!r} of type {type(name).__name__}; names of weights are texts")
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(f"state_dict[{name!r}] is a {type(tensor).__name__}, not a tensor; leave it out")
    if tensor.is_meta:
        raise CheckpointError(f"state_dict[{name!r}] is on the meta device and has no values; load or make it first")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise CheckpointError(
            f"state_dict[{name!r}] is {'quantized' if tensor.is_quantized else f'of layout {tensor.layout}'}; weights "
            "are plain dense tensors: call dequantize() or to_dense() first"
        )
    if not (type(tensor) is torch.Tensor or isinstance(tensor, (torch.nn.Parameter, torch.nn.Buffer))):
        raise CheckpointError(
            f"state_dict[{name!r}] is a {type(tensor).__name__}; weights are plain tensors (full_tensor() makes one of "
            "a distributed tensor)"
        )
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"state_dict[{name!r}] has dtype {tensor.dtype}, which no weight has; cast it first")


_DTYPES = frozenset(DTYPES.values())
