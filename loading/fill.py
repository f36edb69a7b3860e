"""CPU tensors filled from a checkpoint's files: read or cast into huge pages, piece by piece, by a few threads.

Casts read private mappings, which costs no copy; the pages are brought in first, so that a file that was cut or a disk
that fails is an error and no signal, and leave the process once used. What needs no cast or may not be mapped is read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from .arena import HUGE, PAGE, Populator
from .files import Files
from .header import TensorEntry
from .moves import Move
from .workers import Watch, cores, run_all, threads_for

# Bytes that a thread fills at a time, in the file or at the destination, whichever is more: what was made zero, or
# read to be cast, should still be in a processor's cache.
PIECE = 2 * HUGE
WAITERS = 8  # threads where reading is mostly waiting: for a network
READERS = 4  # for a disk


class Piece(NamedTuple):
    """Elements of a tensor from ``begin`` on, as many as ``target`` has."""

    target: torch.Tensor
    entry: TensorEntry
    begin: int


def fill(
    moves: Sequence[Move], room: Mapping[str, torch.Tensor], files: Files, watch: Watch | None, *, waiting: bool = False
) -> None:
    """Bring the tensors of the moves into ``room``, fresh CPU tensors of their shapes and dtypes by target.

    waiting: the files lie far away, so that more threads help than there are processors.
    """
    work = sum(room[move.target].nbytes for move in moves)
    shares = -(-work // (4 * PIECE))
    waiters = WAITERS if waiting else READERS if files.waits_for_disk(moves) else 0
    filler = Filler(files)
    run_all(
        pieces(files.in_order(moves), room, files),
        filler,
        threads=min(max(waiters, cores()), shares) if waiters else threads_for(shares),
        watch=watch,
        abandon=files.abandon,
    )


def pieces(moves: Iterator[Move], room: Mapping[str, torch.Tensor], files: Files) -> Iterator[Piece]:
    """All pieces of the moves, in their order; the disk is asked for each some time before its turn."""
    for move in moves:
        flat = room[move.target].view(-1)
        step = max(1, PIECE // max(move.entry.dtype.itemsize, move.dtype.itemsize))
        begin, end = 0, step - files.into_page(move.entry) // move.entry.dtype.itemsize % step
        while begin < flat.numel():
            files.ahead(move.entry, begin)
            yield Piece(flat[begin:end], move.entry, begin)
            begin, end = end, end + step


class Filler:
    """Fills one piece; called by several threads."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._populate = Populator()
        self._own = threading.local()

    def __call__(self, piece: Piece) -> int:
        """Returns the bytes of the file that were used."""
        target, entry, begin = piece
        end = begin + target.numel()
        self._populate(target)
        if target.dtype == entry.dtype:
            self._files.read(entry, begin, target)
        elif self._files.maps(entry):
            source = self._files.bring(entry, begin, end)
            target.copy_(source)
            self._files.leave(source, entry)
        else:
            self._through_buffer(target, entry, begin)
        return (end - begin) * entry.dtype.itemsize

    def _through_buffer(self, target: torch.Tensor, entry: TensorEntry, begin: int) -> None:
        buffer = getattr(self._own, "buffer", None)
        if buffer is None:
            buffer = self._own.buffer = torch.empty(PIECE + PAGE, dtype=torch.uint8, device="cpu")
        source = self._files.placed(buffer, entry, begin, begin + target.numel())
        target.copy_(self._files.read(entry, begin, source))
