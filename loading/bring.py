"""Moves of tensors whose values do not lie in a file as they are: shared, decoded, cast, sent and quantized.

Each is made in pieces, straight into its destination; to be quantized it is put together whole, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .arena import Populator, allocate

if TYPE_CHECKING:
    from .files import Files
    from .moves import Move
    from .stream import Streamed
    from .workers import Watch

_PIECE = 1 << 18  # bytes: what decoding makes on the way stays in caches, and in memory that the allocator has


def bring(moves: Sequence[Move], files: Files, watch: Watch | None) -> Streamed:
    """The tensors of moves whose entries have `Values`, by model name; bytes are those of where they came from."""
    from .quantize import make_codes
    from .stream import Streamed

    tensors: dict[str, torch.Tensor] = {}
    mapped = copied = quantized = 0
    room: list[tuple[Move, torch.Tensor]] = []
    for move in moves:
        values = move.entry.values
        assert values is not None
        if move.transform in ("map", "disk"):
            tensors[move.target] = values.ready(move.entry, files)
            mapped += values.stored
        elif move.transform == "quantize":
            assert move.packing is not None
            whole = torch.empty(move.entry.shape, dtype=move.packing.recipe.dtype, device=move.device)
            _fill([(move, whole)], files, watch)
            tensors.update(make_codes(move, whole))
            quantized += values.stored
        elif move.transform != "none":
            copied += values.stored
            if move.device.type != "cpu":
                room.append((move, torch.empty(move.entry.shape, dtype=move.dtype, device=move.device)))
    on_cpu = [move for move in moves if move.transform in ("cast", "copy") and move.device.type == "cpu"]
    fresh = allocate([(move.entry.shape, move.dtype) for move in on_cpu])
    room += zip(on_cpu, fresh, strict=True)
    _fill(room, files, watch)
    tensors.update((move.target, tensor) for move, tensor in room)
    return Streamed(tensors, {}, mapped, copied, quantized)


def pieces_of(move: Move, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of elements, each of about 256 KiB before or after a cast, that its values can be made in."""
    entry = move.entry
    assert entry.values is not None
    count, grain = entry.nbytes // entry.dtype.itemsize, entry.values.grain
    step = max(grain, _PIECE // max(itemsize, entry.dtype.itemsize) // grain * grain)
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def equal(one: Move, other: Move, files: Files) -> bool:
    """Whether two weights of one shape and dtype, of which one at least has `Values`, will be equal once loaded."""
    first, second = one.entry.values, other.entry.values
    if first is not None and second is not None and first.home is not None and first.home == second.home:
        left, right = first.ready(one.entry, files), second.ready(other.entry, files)
        if left.data_ptr() == right.data_ptr() and left.stride() == right.stride() and left.dtype == right.dtype:
            return True
    guide = one if first is not None else other
    for begin, end in pieces_of(guide, one.dtype.itemsize):
        left, right = files.flat(one.entry, begin, end), files.flat(other.entry, begin, end)
        if not torch.equal(left.to(one.dtype), right.to(left.device, one.dtype)):
            return False
    return True


def _fill(room: Sequence[tuple[Move, torch.Tensor]], files: Files, watch: Watch | None) -> None:
    """Bring the values of moves into contiguous tensors on their devices, in pieces, by a few threads."""
    from .workers import run_all, threads_for

    populate = Populator()

    def jobs() -> Iterator[tuple[Move, torch.Tensor, int, int]]:
        for move, tensor in room:
            for begin, end in pieces_of(move, tensor.element_size()):
                yield move, tensor.view(-1), begin, end

    def fill(job: tuple[Move, torch.Tensor, int, int]) -> int:
        move, flat, begin, end = job
        target = flat[begin:end]
        if target.device.type == "cpu":
            populate(target)
        assert move.entry.values is not None
        move.entry.values.fill(move.entry, files, begin, target)
        return (end - begin) * move.entry.dtype.itemsize

    work = sum(tensor.numel() * tensor.element_size() for _, tensor in room)
    run_all(jobs(), fill, threads=threads_for(-(-work // (64 * _PIECE))), watch=watch, abandon=files.abandon)
