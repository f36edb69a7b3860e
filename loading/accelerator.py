"""Weights sent to an accelerator: pinned buffers in a ring and a side stream, so that reading overlaps copying."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .arena import DONTNEED, POPULATE_READ, advise
from .files import Files
from .plan import Move
from .quantize import make_codes, source_of

SLOT = 32 << 20  # bytes of one pinned buffer
SLOTS = 4
_ALIGNMENT = 256


def send(moves: Sequence[Move], files: Files, watch: Callable[[int], None] | None) -> dict[str, torch.Tensor]:
    """Tensors of the moves on their devices. The source dtype travels; casts and codes are made on the device."""
    by_device: dict[torch.device, list[Move]] = {}
    for move in moves:
        by_device.setdefault(move.device, []).append(move)
    tensors: dict[str, torch.Tensor] = {}
    for device, group in by_device.items():
        if device.type == "cuda":
            tensors.update(_send_cuda(group, device, files, watch))
        else:
            tensors.update(_send_plain(group, device, files, watch))
    return tensors


def _send_plain(
    moves: Sequence[Move], device: torch.device, files: Files, watch: Callable[[int], None] | None
) -> dict[str, torch.Tensor]:
    tensors = {}
    for move in moves:
        arrived = source_of(move.entry, files).to(device)
        if move.packing is not None:
            tensors.update(make_codes(move, arrived))
        else:
            tensors[move.target] = arrived.to(move.dtype)
        if watch is not None:
            watch(move.entry.nbytes)
    return tensors


def _send_cuda(
    moves: Sequence[Move], device: torch.device, files: Files, watch: Callable[[int], None] | None
) -> dict[str, torch.Tensor]:
    with torch.cuda.device(device):
        caller = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        largest = max(move.entry.nbytes for move in moves)
        ring = Ring(side, min(SLOT, -(-largest // _ALIGNMENT) * _ALIGNMENT))
        tensors = {}
        side.wait_stream(caller)
        for move in moves:
            if move.packing is not None:
                tensors.update(_packed_there(move, device, ring, caller, side, files))
                if watch is not None:
                    watch(move.entry.nbytes)
                continue
            result = torch.empty(move.entry.shape, dtype=move.dtype, device=device)
            result.record_stream(side)
            with torch.cuda.stream(side):
                arrived = (
                    result
                    if move.entry.dtype == move.dtype
                    else torch.empty(move.entry.shape, dtype=move.entry.dtype, device=device)
                )
                ring.copy(move, arrived, files)
                if arrived is not result:
                    result.copy_(arrived)
            tensors[move.target] = result
            if watch is not None:
                watch(move.entry.nbytes)
        caller.wait_stream(side)
        side.synchronize()  # the pinned buffers are freed when we return
    return tensors


def _packed_there(
    move: Move, device: torch.device, ring: Ring, caller: torch.cuda.Stream, side: torch.cuda.Stream, files: Files
) -> dict[str, torch.Tensor]:
    """Codes made on the side stream. It owns the memory of the tensor they are made of, which the next one reuses."""
    with torch.cuda.stream(side):
        arrived = torch.empty(move.entry.shape, dtype=move.entry.dtype, device=device)
        ring.copy(move, arrived, files)
        made = make_codes(move, arrived)
    for part in made.values():
        if part.is_cuda:
            part.record_stream(caller)
    return made


class Ring:
    """Pinned buffers used in turn; one is written again only after the device has taken what it held."""

    def __init__(self, side: torch.cuda.Stream, size: int) -> None:
        self._side = side
        self._buffers = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(SLOTS)]
        self._taken: list[torch.cuda.Event | None] = [None] * SLOTS
        self._turn, self._used, self._size = 0, 0, size

    def copy(self, move: Move, target: torch.Tensor, files: Files) -> None:
        """Copy a tensor's bytes to ``target``, of the same dtype, on the side stream."""
        out = target.view(-1).view(torch.uint8)
        base, position = move.entry.offset, 0
        while position < move.entry.nbytes:
            buffer = self._room()
            count = min(buffer.numel(), move.entry.nbytes - position)
            source = files.octets(move.entry.file, base + position, base + position + count)
            advise(source, POPULATE_READ, inside=False)
            buffer[:count].copy_(source)
            advise(source, DONTNEED, inside=True)
            out[position : position + count].copy_(buffer[:count], non_blocking=True)
            self._used += -(-count // _ALIGNMENT) * _ALIGNMENT
            position += count

    def _room(self) -> torch.Tensor:
        """The free rest of the current buffer, or the next buffer once it is free."""
        if self._used >= self._size:
            event = torch.cuda.Event()
            event.record(self._side)
            self._taken[self._turn] = event
            self._turn, self._used = (self._turn + 1) % SLOTS, 0
            waiting = self._taken[self._turn]
            if waiting is not None:
                waiting.synchronize()
        return self._buffers[self._turn][self._used :]
