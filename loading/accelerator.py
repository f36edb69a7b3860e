"""Weights sent to accelerators: the source dtype travels, casts and codes are made on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .files import Files
from .moves import Move
from .quantize import make_codes
from .ring import Ring, slot_size
from .workers import Watch

_STAGES = 3  # loads on the device at a time: one arrives, one waits, one is taken apart


def send(moves: Sequence[Move], files: Files, watch: Watch | None) -> dict[str, torch.Tensor]:
    """Tensors of the moves on their devices."""
    cuda = [move for move in moves if move.device.type == "cuda"]
    plain = [move for move in moves if move.device.type != "cuda"]
    tensors: dict[str, torch.Tensor] = {}
    if cuda:
        largest = slot_size(cuda)
        lanes = {device: CudaLane(device, largest) for device in dict.fromkeys(move.device for move in cuda)}

        def pin(size: int) -> torch.Tensor:  # in a thread, whose device is the first one, used or not
            with torch.cuda.device(cuda[0].device):
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

        tensors.update(Ring(files, lanes, pin, watch).send(cuda))
    if plain:
        tensors.update(_send_plain(plain, files, watch))
    return tensors


class CudaLane:
    """Copies on a side stream, everything else on the caller's: all memory is the caller's, and used again by it.

    Loads arrive in a few places on the device in turn; a place is written again only after the caller's stream has
    taken out what it held.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._caller, self._side = torch.cuda.current_stream(), torch.cuda.Stream()
            self._places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(_STAGES)]
            self._done: list[torch.cuda.Event | None] = [None] * _STAGES
            self._side.wait_stream(self._caller)  # the places may be memory that it still uses
        self._turn = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device, of the caller's stream, which alone writes it."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def carry(self, octets: torch.Tensor, unpack: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        """See `ring.Lane`."""
        with torch.cuda.device(self._device):
            turn = self._turn
            place, done = self._places[turn][: octets.numel()], self._done[turn]
            with torch.cuda.stream(self._side):
                if done is not None:
                    self._side.wait_event(done)
                place.copy_(octets, non_blocking=True)
                arrived = torch.cuda.Event(blocking=True)
                arrived.record(self._side)
            with torch.cuda.stream(self._caller):
                self._caller.wait_event(arrived)
                unpack(place)
                self._done[turn] = event = torch.cuda.Event()
                event.record(self._caller)
            self._turn = (turn + 1) % _STAGES
        return arrived.synchronize

    def finish(self) -> None:
        """See `ring.Lane`."""
        self._side.synchronize()
        self._caller.wait_stream(self._side)


def _send_plain(moves: Sequence[Move], files: Files, watch: Watch | None) -> dict[str, torch.Tensor]:
    """One tensor after the other, for devices without pinned memory and streams of their own."""
    tensors = {}
    for move in files.in_order(moves):
        files.ahead(move.entry)
        source = files.bring(move.entry, 0, move.entry.nbytes // move.entry.dtype.itemsize)
        arrived = source.view(move.entry.shape).to(move.device, copy=True)
        if move.packing is not None:
            tensors.update(make_codes(move, arrived))
        else:
            tensors[move.target] = arrived.to(move.dtype)
        files.leave(source, move.entry)
        if watch is not None:
            watch(move.entry.nbytes)
    return tensors
