"""Weights on their way to accelerators: a few pinned slots for the whole load, filled ahead by reader threads.

Consecutive bytes of a file that belong to one device travel together, small tensors beside each other, whatever shard
they come from. A load of a slot is one read and one copy; on the device the tensors are taken out of it, cast, or put
together to be quantized. A slot is filled again only after the device has what it held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from .arena import PAGE
from .files import Files
from .moves import Move
from .quantize import make_codes
from .reading import placed
from .workers import Watch, cores, join

SLOT = 16 << 20  # bytes of a slot: a transfer of this size runs at the full speed of the bus
SLOTS = 12
READERS = 8  # one processor copies from the page cache at a fraction of the bus's speed
_GAP = 64 << 10  # bytes of something else that are read along rather than begin another load


class Lane(Protocol):
    """The way to one device."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device."""

    def carry(self, octets: torch.Tensor, unpack: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        """Copy pinned bytes to the device, then call ``unpack`` with them there, in the order of the calls.

        Returns what waits until the pinned bytes have been taken.
        """

    def finish(self) -> None:
        """Wait until everything has been done."""


class Part(NamedTuple):
    """A tensor's elements from ``begin`` on, ``amount`` of them, at ``place`` of a load, in bytes."""

    move: Move
    begin: int
    amount: int
    place: int


class Load(NamedTuple):
    """Bytes of a file that fill a slot."""

    file: Path
    begin: int
    size: int
    device: torch.device
    parts: list[Part]


def loads(moves: Iterable[Move], slot: int) -> Iterator[Load]:
    """What fills one slot after the other. Each part lies at a multiple of its item size, as its load begins there."""
    file, start, end, device = None, 0, 0, None
    parts: list[Part] = []
    for move in moves:
        entry, size, done = move.entry, move.entry.dtype.itemsize, 0
        while done < entry.nbytes:
            begin = entry.offset + done
            joins = file == entry.file and device == move.device and 0 <= begin - end <= _GAP
            room = slot - (begin - start)
            if parts and not (joins and (begin - start) % size == 0 and room >= size):
                assert file is not None
                assert device is not None
                yield Load(file, start, end - start, device, parts)
                parts = []
            if not parts:
                file, start, device, room = entry.file, begin, move.device, slot
            count = min(room, entry.nbytes - done) // size
            parts.append(Part(move, done // size, count, begin - start))
            done += count * size
            end = entry.offset + done
    if parts and file is not None and device is not None:
        yield Load(file, start, end - start, device, parts)


def slot_size(moves: Sequence[Move]) -> int:
    """Bytes of a slot for these moves, and so of a lane's largest load: `SLOT`, or less if they take less."""
    total = sum(move.entry.nbytes for move in moves)
    return min(SLOT, max(-(-total // 4096) * 4096, 4096))


class Ring:
    """Carries the tensors of moves to their devices.

    lanes: the way to each device. pin: makes a slot of so many bytes, from which a device can copy by itself.
    """

    def __init__(
        self, files: Files, lanes: Mapping[torch.device, Lane], pin: Callable[[int], torch.Tensor], watch: Watch | None
    ) -> None:
        self._files, self._lanes, self._pin, self._watch = files, lanes, pin, watch
        self._feed = threading.Lock()
        self._state = threading.Condition()
        self._failures: list[BaseException] = []
        self._filled: dict[int, Load] = {}
        self._sent: dict[int, Callable[[], None]] = {}
        self._taken, self._end = 0, -1  # loads handed out; how many there are, once that is known

    def send(self, moves: list[Move]) -> dict[str, torch.Tensor]:
        """The tensors of all moves, by name, on their devices; nothing runs any more when this returns or raises.

        Raises what reading raises, QuantizationError for what has no codes, and torch's error if memory is out.
        """
        goods = _Goods(moves, self._lanes)
        total = sum(move.entry.nbytes for move in moves)
        size = slot_size(moves)
        count = min(SLOTS, -(-total // size) + 1)
        self._slots: list[torch.Tensor | None] = [None] * count
        spare = PAGE if self._files.direct and size > PAGE else 0
        self._loads = loads(self._files.in_order(moves), size - spare)
        threads = max(1, min(READERS, cores(), count - 1))
        readers = [
            threading.Thread(target=self._read, args=(size,), name="loadstone-read", daemon=True)
            for _ in range(threads)
        ]
        try:
            for reader in readers:
                reader.start()
            self._carry_all(goods)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            join(readers)
            for lane in self._lanes.values():
                lane.finish()  # the slots are let go of when we return
        return goods.tensors

    def _carry_all(self, goods: _Goods) -> None:
        number = 0
        while (load := self._next(number)) is not None:
            wait = self._lanes[load.device].carry(self._held(number, load), goods.unpacker(load))
            with self._state:
                self._sent[number] = wait
                self._state.notify_all()
            if self._watch is not None:
                self._watch(sum(part.amount * part.move.entry.dtype.itemsize for part in load.parts))
            number += 1

    def _held(self, number: int, load: Load) -> torch.Tensor:
        """The part of a slot that a load takes; what is read past the page cache lies in its page as in the file."""
        slot = self._slots[number % len(self._slots)]
        assert slot is not None
        direct = self._files.direct and load.size + PAGE <= slot.numel()
        return placed(slot, load.begin, load.size) if direct else slot[: load.size]

    def _next(self, number: int) -> Load | None:
        """The load of that number, once it is in its slot; None after the last."""
        with self._state:
            self._state.wait_for(lambda: self._failures or number in self._filled or self._end == number)
            if self._failures:
                raise self._failures[0]
            return self._filled.pop(number, None)

    def _read(self, size: int) -> None:
        """Fill slots, until there is nothing more to read. A thread of its own."""
        try:
            while (taken := self._take()) is not None:
                number, load = taken
                place = number % len(self._slots)
                if not self._free(number):
                    return
                if self._slots[place] is None:
                    self._slots[place] = self._pin(size)
                self._files.reader.into(self._held(number, load), load.file, load.begin)
                with self._state:
                    self._filled[number] = load
                    self._state.notify_all()
        except BaseException as error:  # raised again by `send`
            self._fail(error)

    def _take(self) -> tuple[int, Load] | None:
        with self._feed:
            load = None if self._failures else next(self._loads, None)
            if load is None:
                with self._state:
                    self._end = self._taken
                    self._state.notify_all()
                return None
            self._files.ahead(load.parts[0].move.entry, load.parts[0].begin)
            self._taken += 1
            return self._taken - 1, load

    def _free(self, number: int) -> bool:
        """Wait until the device has what the slot held before; False if the load has failed meanwhile."""
        before = number - len(self._slots)
        with self._state:
            self._state.wait_for(lambda: self._failures or before < 0 or before in self._sent)
            if self._failures:
                return False
            wait = self._sent.pop(before, None)
        if wait is not None:
            wait()
        return True

    def _fail(self, error: BaseException) -> None:
        with self._state:
            self._failures.append(error)
            self._state.notify_all()
        self._files.abandon()


class _Goods:
    """The tensors on the devices: allocated at once, so that nothing else is needed later but what quantizing makes."""

    def __init__(self, moves: list[Move], lanes: Mapping[torch.device, Lane]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._flat: dict[str, torch.Tensor] = {}
        self._left = {move.target: move.entry.nbytes for move in moves}
        bench: dict[torch.device, int] = {}
        for move in moves:
            if move.packing is None:
                tensor = lanes[move.device].empty(move.entry.shape, move.dtype)
                self.tensors[move.target] = tensor
                self._flat[move.target] = tensor.view(-1)
            else:
                bench[move.device] = max(bench.get(move.device, 0), move.entry.nbytes)
        # Where tensors to be quantized are put together: one after the other, so one place is enough.
        self._bench = {device: lanes[device].empty((size,), torch.uint8) for device, size in bench.items()}
        for move in moves:
            if move.packing is not None and not move.entry.nbytes:
                self._pack(move)

    def unpacker(self, load: Load) -> Callable[[torch.Tensor], None]:
        """What takes the tensors out of a load on its device."""

        def unpack(octets: torch.Tensor) -> None:
            for move, begin, count, place in load.parts:
                size = move.entry.dtype.itemsize
                source = octets[place : place + count * size]
                if move.packing is None:
                    self._flat[move.target][begin : begin + count].copy_(source.view(move.entry.dtype))
                else:
                    self._bench[move.device][begin * size : (begin + count) * size].copy_(source)
                self._left[move.target] -= count * size
                if move.packing is not None and not self._left[move.target]:
                    self._pack(move)

        return unpack

    def _pack(self, move: Move) -> None:
        bench = self._bench[move.device]
        whole = bench[: move.entry.nbytes].view(move.entry.dtype).view(move.entry.shape)
        base = bench.untyped_storage().data_ptr()
        for name, part in make_codes(move, whole).items():
            kept = part.untyped_storage().data_ptr() == base and part.nbytes > 0
            self.tensors[name] = part.clone() if kept else part
