"""A checkpoint's files while it is loaded: mapped into memory, or read from end to end, and its tensors in them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from ..errors import IntegrityError, ReadError
from .arena import DONTNEED, FAULT, PAGE, POPULATE_READ, advise
from .checkpoint import Checkpoint
from .disk import map_file
from .header import TensorEntry
from .reading import AHEAD, Reader, placed

if TYPE_CHECKING:
    from .moves import Move


class Files:
    """The bytes of a checkpoint's tensors, and what the system is told about them.

    ``mapped``: views and casts come from private mappings, made when first needed. Without it no file is mapped, and
    every tensor is read into memory of its own; ``direct``: past the page cache where that is not faster. `close` lets
    go of what was opened to be read; mappings live as long as their tensors.
    """

    def __init__(self, checkpoint: Checkpoint, *, mapped: bool = True, direct: bool = False) -> None:
        self.mapped = mapped
        self.reader = Reader(checkpoint, direct=direct)
        self._checkpoint = checkpoint
        self._stamps = checkpoint.stamps
        self._storages: dict[Path, torch.UntypedStorage] = {}
        self._empty: dict[torch.dtype, torch.Tensor] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that were opened to be read."""
        self.reader.close()

    def in_order(self, moves: Sequence[Move]) -> Iterator[Move]:
        """The moves in the order in which their files can be had, each as soon as its file is there."""
        arrivals = self._checkpoint.arrivals
        return iter(moves) if arrivals is None else arrivals.in_order(moves)

    def abandon(self) -> None:
        """Wake whoever waits for a file that is still to come: the load has failed."""
        if self._checkpoint.arrivals is not None:
            self._checkpoint.arrivals.abandon()

    def maps(self, entry: TensorEntry) -> bool:
        """Whether a tensor's bytes come from a mapping: this may be done, and its place in the file suits its dtype."""
        return self.mapped and entry.values is None and entry.offset % entry.dtype.itemsize == 0

    def raw(self, file: Path, begin: int, end: int) -> torch.UntypedStorage:
        """Bytes of a file as a storage of their own, so that saving a tensor on it does not save the whole file."""
        whole = self._storages.get(file)
        if whole is None:
            self._checkpoint.wait(file)
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
        """Elements ``begin`` to ``end``, in the file's mapping if that aligns them, else in memory of their own, or
        where the entry's own `Values` have them."""
        if entry.values is not None:
            return entry.values.part(entry, self, begin, end)
        size = entry.dtype.itemsize
        if self.maps(entry):
            start = entry.offset + begin * size
            return self._on(self.raw(entry.file, start, entry.offset + end * size), entry.dtype, (end - begin,))
        nbytes = (end - begin) * size
        if not self.direct:
            return self.read(entry, begin, torch.empty(nbytes, dtype=torch.uint8, device="cpu").view(entry.dtype))
        room = torch.empty(nbytes + PAGE, dtype=torch.uint8, device="cpu")
        return self.read(entry, begin, self.placed(room, entry, begin, end))

    def read(self, entry: TensorEntry, begin: int, target: torch.Tensor) -> torch.Tensor:
        """Fill a contiguous CPU tensor of the same dtype with the elements from ``begin`` on; returns it.

        Raises IntegrityError if the file has changed or ends early, ReadError if the system cannot read it.
        """
        self.reader.into(target, entry.file, entry.offset + begin * entry.dtype.itemsize)
        return target

    @property
    def direct(self) -> bool:
        """Whether bytes may be read past the page cache."""
        return self.reader.direct

    def into_page(self, entry: TensorEntry) -> int:
        """How far into a page of its file a tensor begins, if that counts: what is read past the page cache must lie
        in memory as it does in the file."""
        counts = self.direct and entry.values is None and entry.offset % entry.dtype.itemsize == 0
        return entry.offset % PAGE if counts else 0

    def placed(self, room: torch.Tensor, entry: TensorEntry, begin: int, end: int) -> torch.Tensor:
        """Elements ``begin`` to ``end`` of a tensor in bytes of ``room``, a page more than they: where they can be read
        past the page cache, if their file aligns them."""
        size = entry.dtype.itemsize
        start = entry.offset + begin * size
        return placed(room, start - start % size, (end - begin) * size).view(entry.dtype)

    def waits_for_disk(self, moves: Sequence[Move]) -> bool:
        """Whether the largest of the tensors would be read past the page cache: others beside it will be too.

        Not of files that are still being downloaded, for which nobody should wait yet.
        """
        if not self.direct or not moves or self._checkpoint.arrivals is not None:
            return False
        entry = max((move.entry for move in moves), key=lambda entry: entry.nbytes)
        return self.reader.past_cache(entry.file, entry.offset, entry.nbytes)

    def bring(self, entry: TensorEntry, begin: int, end: int) -> torch.Tensor:
        """`flat`, with the bytes in memory, so that touching them neither waits nor fails."""
        found = self.flat(entry, begin, end)
        if self.maps(entry):
            self._populate(found, entry, begin)
        return found

    def leave(self, found: torch.Tensor, entry: TensorEntry) -> None:
        """What `flat` or `bring` gave is not needed again: its pages leave this process, not the page cache."""
        if self.maps(entry):
            advise(found, DONTNEED, inside=True)

    def ahead(self, entry: TensorEntry, begin: int = 0) -> None:
        """Ask the disk for what follows element ``begin`` of a tensor, in this file."""
        start = entry.offset + begin * entry.dtype.itemsize
        self.reader.ahead(entry.file, start, min(start + AHEAD, self._stamps[entry.file].size))

    def _populate(self, found: torch.Tensor, entry: TensorEntry, begin: int) -> None:
        """Bring mapped pages in. Where the system says that touching them would be a SIGBUS, reading them says why."""
        if advise(found, POPULATE_READ, inside=False) in FAULT:
            self.read(entry, begin, torch.empty_like(found))
            if (code := advise(found, POPULATE_READ, inside=False)) in FAULT:
                raise ReadError(f"{entry.file} can be read, but its mapping cannot ({os.strerror(code)}); load again")

    def _on(self, storage: torch.UntypedStorage, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        empty = self._empty.get(dtype)
        if empty is None:
            empty = self._empty[dtype] = torch.empty(0, dtype=dtype, device="cpu")
        return empty.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
