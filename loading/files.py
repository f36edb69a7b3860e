"""A checkpoint's files mapped into memory, and its tensors as views of them."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import IntegrityError
from .checkpoint import Checkpoint
from .disk import map_file
from .header import TensorEntry


class Files:
    """Private mappings of a checkpoint's files, made when first needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stamps = checkpoint.stamps
        self._storages: dict[Path, torch.UntypedStorage] = {}
        self._empty: dict[torch.dtype, torch.Tensor] = {}

    def raw(self, file: Path, begin: int, end: int) -> torch.UntypedStorage:
        """Bytes of a file as a storage of their own, so that saving a tensor on it does not save the whole file."""
        whole = self._storages.get(file)
        if whole is None:
            try:
                whole = map_file(file, self._stamps[file].size)
            except (OSError, RuntimeError) as error:
                raise IntegrityError(f"cannot map {file}; did it change since its header was read? {error}") from error
            self._storages[file] = whole
        return whole[begin:end]

    def view(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor as it lies in its file; its offset must suit its dtype."""
        return self._on(self.raw(entry.file, entry.offset, entry.offset + entry.nbytes), entry.dtype, entry.shape)

    def flat(self, entry: TensorEntry, begin: int, end: int) -> torch.Tensor:
        """Elements ``begin`` to ``end``; a copy if the file does not align them."""
        size = entry.dtype.itemsize
        start = entry.offset + begin * size
        raw = self.raw(entry.file, start, entry.offset + end * size)
        if start % size == 0:
            return self._on(raw, entry.dtype, (end - begin,))
        return self._on(raw, torch.uint8, (raw.nbytes(),)).clone().view(entry.dtype)

    def octets(self, file: Path, begin: int, end: int) -> torch.Tensor:
        """Bytes of a file, as uint8."""
        return self._on(self.raw(file, begin, end), torch.uint8, (end - begin,))

    def _on(self, storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        empty = self._empty.get(dtype)
        if empty is None:
            empty = self._empty[dtype] = torch.empty(0, dtype=dtype, device="cpu")
        return empty.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
