"""Where a tensor's values come from, if they do not simply lie in its file one after another.

An entry of a checkpoint with such `Values` has an ``offset`` of -1, so that no one takes bytes of its file for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .files import Files
    from .header import TensorEntry


class Values(ABC):
    """The source of one tensor's values.

    ``home``: the device on which the whole tensor lies ready, so that it may be the weight itself; None if it has to be
    made. ``stored``: bytes it takes where it comes from; ``form``: what these are called, if not by the dtype.
    ``grain``: parts are best multiples of so many elements.
    """

    home: torch.device | None = None
    form: str | None = None
    stored: int
    grain: int = 1

    @abstractmethod
    def ready(self, entry: TensorEntry, files: Files) -> torch.Tensor:
        """The whole tensor, in the entry's shape and dtype; without a copy where there is a ``home``."""

    def part(self, entry: TensorEntry, files: Files, begin: int, end: int) -> torch.Tensor:
        """Elements ``begin`` to ``end`` in row-major order, one-dimensional, in the entry's dtype."""
        return flat_part(self.ready(entry, files), begin, end)

    def fill(self, entry: TensorEntry, files: Files, begin: int, target: torch.Tensor) -> None:
        """Bring the elements from ``begin`` on into a one-dimensional tensor, of any dtype and on any device."""
        target.copy_(self.part(entry, files, begin, begin + target.numel()))


class LooseBytes(Values):
    """A tensor's elements in a row, to be copied: the file does not align them, or another tensor has them too."""

    def __init__(self, begin: int, stored: int) -> None:
        self.begin, self.stored = begin, stored

    def ready(self, entry: TensorEntry, files: Files) -> torch.Tensor:
        return self.part(entry, files, 0, self.stored // entry.dtype.itemsize).view(entry.shape)

    def part(self, entry: TensorEntry, files: Files, begin: int, end: int) -> torch.Tensor:
        size = entry.dtype.itemsize
        return _read(entry, files, self.begin + begin * size, (end - begin) * size)

    def fill(self, entry: TensorEntry, files: Files, begin: int, target: torch.Tensor) -> None:
        if target.dtype == entry.dtype and target.device.type == "cpu":
            files.reader.into(target, entry.file, self.begin + begin * entry.dtype.itemsize)
        else:
            super().fill(entry, files, begin, target)


class StridedBytes(Values):
    """A tensor that steps through bytes of its file: transposed, sliced or expanded.

    ``begin``, ``stored``: the bytes it steps through; ``strides`` in elements. ``whole``: it may be the weight as it
    lies there, a private view of the file.
    """

    def __init__(self, begin: int, stored: int, strides: Sequence[int], whole: bool) -> None:
        self.begin, self.stored, self.strides = begin, stored, tuple(strides)
        self.home = torch.device("cpu") if whole else None

    def ready(self, entry: TensorEntry, files: Files) -> torch.Tensor:
        if self.home is None or not files.mapped:
            return _read(entry, files, self.begin, self.stored).as_strided(entry.shape, self.strides)
        empty = torch.empty(0, dtype=entry.dtype, device="cpu")
        storage = files.raw(entry.file, self.begin, self.begin + self.stored)
        return empty.set_(storage, 0, entry.shape, self.strides)


def _read(entry: TensorEntry, files: Files, begin: int, nbytes: int) -> torch.Tensor:
    """Bytes of the entry's file as elements, in memory of their own."""
    target = torch.empty(nbytes // entry.dtype.itemsize, dtype=entry.dtype, device="cpu")
    files.reader.into(target, entry.file, begin)
    return target


def flat_part(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Elements ``begin`` to ``end`` of a tensor in row-major order; only the rows they lie in are copied, if any."""
    if tensor.is_contiguous() or tensor.dim() == 0:
        return tensor.reshape(-1)[begin:end]
    row = max(1, tensor[0].numel()) if len(tensor) else 1
    first = begin // row
    return tensor[first : -(-end // row)].reshape(-1)[begin - first * row : end - first * row]


def steps_on_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements may share memory, so that writing to one would change another."""
    reach = 0
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
