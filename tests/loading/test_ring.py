"""The way to accelerators, with a device that does everything as late as it may, and in memory that shows misuse."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import examples

from loadstone.errors import ReadError
from loadstone.loading import reading, ring
from loadstone.loading.files import Files
from loadstone.loading.plan import Move

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPU = torch.device("cpu")


class LateLane:
    """A device on which nothing happens before someone waits for it. It counts its memory."""

    def __init__(self, lateness: int) -> None:
        self.queue: list[Callable[[], None]] = []
        self.done, self.issued, self.memory, self.finished = 0, 0, 0, False
        self.lateness, self.lock = lateness, threading.RLock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self.memory += tensor.nbytes
        return tensor

    def carry(self, octets: torch.Tensor, unpack: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        def work() -> None:
            there = octets.clone()
            octets.fill_(0xA5)  # whoever still counts on what the slot held gets this
            unpack(there)

        with self.lock:
            self.queue.append(work)
            self.issued += 1
            number = self.issued
            if len(self.queue) > self.lateness:
                self._until(number - self.lateness)
        return lambda: self._until(number)

    def _until(self, number: int) -> None:
        with self.lock:
            while self.done < number:
                self.done += 1
                self.queue.pop(0)()

    def finish(self) -> None:
        self._until(self.issued)
        self.finished = True


class Pins:
    """Makes slots, filled with what no tensor has, and counts them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> torch.Tensor:
        self.sizes.append(size)
        return torch.full((size,), 0x5A, dtype=torch.uint8)


def checkpoint_of(directory: Path, shards: list[dict[str, torch.Tensor]]) -> Any:
    from loadstone.loading.checkpoint import Checkpoint
    from loadstone.loading.header import read_header

    for number, tensors in enumerate(shards):
        save_file(tensors, directory / f"{number}.safetensors")
    headers = [read_header(directory / f"{number}.safetensors") for number in range(len(shards))]
    return Checkpoint.from_headers("test", headers)


def moves_of(checkpoint: Any, dtype: torch.dtype, devices: list[torch.device]) -> list[Move]:
    return [
        Move(name, entry, devices[number % len(devices)], dtype, "cast" if entry.dtype != dtype else "copy")
        for number, (name, entry) in enumerate(checkpoint.entries.items())
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SLOT", 4096)
    monkeypatch.setattr(ring, "SLOTS", 3)
    monkeypatch.setattr(ring, "cores", lambda: 8)


@given(st.data())
@examples(60)
def test_tensors_arrive_bit_for_bit(tmp_path: Path, data: st.DataObject) -> None:
    """Any sizes and dtypes, several shards and devices, slots far too small, a device that is as late as it may be."""
    shapes = st.lists(st.integers(0, 40), max_size=2)
    spec = data.draw(st.lists(st.lists(st.tuples(shapes, st.sampled_from(FLOATS)), min_size=1, max_size=8),
                              min_size=1, max_size=3))  # fmt: skip
    shards = [
        {f"{number}.{place}": torch.randn(shape).to(dtype) for place, (shape, dtype) in enumerate(tensors)}
        for number, tensors in enumerate(spec)
    ]
    checkpoint, dtype = checkpoint_of(tmp_path, shards), data.draw(st.sampled_from(FLOATS))
    devices = [CPU, torch.device("meta")][: data.draw(st.integers(1, 2))]  # only names here
    lanes = {device: LateLane(data.draw(st.integers(0, 9))) for device in devices}
    moves, seen, pins = moves_of(checkpoint, dtype, devices), [], Pins()
    with pytest.MonkeyPatch.context() as patch, Files(checkpoint) as files:
        patch.setattr(ring, "SLOT", 8 * data.draw(st.integers(1, 200)))
        patch.setattr(ring, "SLOTS", data.draw(st.integers(2, 5)))
        patch.setattr(ring, "_GAP", data.draw(st.sampled_from([0, 64])))
        patch.setattr(ring, "cores", lambda: data.draw(st.integers(1, 4)))
        arrived = ring.Ring(files, lanes, pins, seen.append).send(moves)
    wanted = {name: tensor.to(dtype) for tensors in shards for name, tensor in tensors.items()}
    assert arrived.keys() == wanted.keys()
    assert all(torch.equal(arrived[name], wanted[name]) for name in wanted)
    assert sum(seen) == sum(move.entry.nbytes for move in moves)
    assert all(lane.finished and not lane.queue for lane in lanes.values())


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(1, 40))
@examples(60)
def test_loads_cover_all_once_in_order(sizes: list[int], slot: int) -> None:
    from loadstone.loading.header import TensorEntry

    slot, offset, moves = slot * 256, 100, []
    for number, size in enumerate(sizes):
        entry = TensorEntry(str(number), torch.int16, (size,), Path("x"), offset, 2 * size)
        moves.append(Move(str(number), entry, CPU, torch.int16, "copy"))
        offset += 2 * size
    made = list(ring.loads(iter(moves), slot))
    assert [load.begin for load in made] == [100 + slot * number for number in range(len(made))]
    assert all(0 < load.size <= slot for load in made)
    assert sum(load.size for load in made) == offset - 100
    covered = [
        (int(part.move.target), part.begin + i) for load in made for part in load.parts for i in range(part.amount)
    ]
    assert covered == [(number, i) for number, size in enumerate(sizes) for i in range(size)]


def test_a_few_slots_serve_all_shards(tmp_path: Path, small: None) -> None:
    """Many small tensors share loads; what is pinned does not grow with the model."""
    shards = [{f"{shard}.{number}": torch.randn(100) for number in range(200)} for shard in range(3)]
    checkpoint, lane, pins = checkpoint_of(tmp_path, shards), LateLane(1), Pins()
    carried: list[int] = []
    original = lane.carry
    lane.carry = lambda octets, unpack: (carried.append(octets.numel()), original(octets, unpack))[1]  # type: ignore[method-assign]
    with Files(checkpoint) as files:
        ring.Ring(files, {CPU: lane}, pins, None).send(moves_of(checkpoint, torch.bfloat16, [CPU]))
    assert pins.sizes == [4096] * 3
    assert sum(carried) == 3 * 200 * 400
    assert len(carried) == 3 * -(-200 * 400 // 4096)
    assert lane.memory == 3 * 200 * 200, "nothing on the device but the model"


def test_the_reading_is_ahead_over_the_ends_of_shards(tmp_path: Path, small: None, monkeypatch: Any) -> None:
    shards = [{f"{shard}": torch.randn(512)} for shard in range(3)]  # half a slot each
    checkpoint, lane = checkpoint_of(tmp_path, shards), LateLane(0)
    read: list[str] = []
    original = reading.Reader.into
    monkeypatch.setattr(
        reading.Reader,
        "into",
        lambda self, target, file, begin: (read.append(file.name), original(self, target, file, begin)),
    )
    ahead: list[int] = []
    carry = lane.carry

    def slow(octets: torch.Tensor, unpack: Any) -> Any:
        deadline = time.monotonic() + 20
        while not ahead and len(read) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        ahead.append(len(read))
        return carry(octets, unpack)

    lane.carry = slow  # type: ignore[method-assign]
    with Files(checkpoint) as files:
        ring.Ring(files, {CPU: lane}, Pins(), None).send(moves_of(checkpoint, torch.float32, [CPU]))
    assert ahead[0] == 3, "all three shards were being read before the first load left"


class _Failing:
    def __init__(self, inner: Any, after: int, error: BaseException) -> None:
        self.inner, self.after, self.error = inner, after, error

    def __call__(self, *arguments: Any) -> Any:
        self.after -= 1
        if self.after < 0:
            raise self.error
        return self.inner(*arguments)


@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("where", ["read", "carry", "pin", "unpack", "watch"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_whatever_fails_nothing_runs_on(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, where: str, after: int, kind: type[BaseException]
) -> None:
    checkpoint = checkpoint_of(tmp_path, [{f"{n}": torch.randn(3000) for n in range(20)}])
    lane, pins = LateLane(2), Pins()
    if where == "pin" and after == 7:
        pytest.skip("there are three slots")
    error = kind("injected") if kind is KeyboardInterrupt else OSError(5, "injected")
    watch: Any = None
    pin: Any = pins
    if where == "read":
        monkeypatch.setattr(reading, "_read", _Failing(reading._read, after, error))
    elif where == "carry":
        lane.carry = _Failing(lane.carry, after, error)  # type: ignore[method-assign]
    elif where == "pin":
        pin = _Failing(pins, after, error)
    elif where == "unpack":
        copy = torch.Tensor.copy_
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: failing(*a))
        failing = _Failing(copy, after, error)
    else:
        watch = _Failing(lambda count: None, after, error)
    with Files(checkpoint) as files, pytest.raises((ReadError, OSError, KeyboardInterrupt), match="injected"):
        ring.Ring(files, {CPU: lane}, pin, watch).send(moves_of(checkpoint, torch.bfloat16, [CPU]))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loadstone")]


def test_a_model_goes_through_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """`load_into` with a CPU that takes part as an accelerator, quantization on it included."""
    from loadstone.loading import accelerator, stream

    toy.save(tmp_path, toy.weights(), shards=3)
    lanes: list[LateLane] = []

    def send(moves: list[Move], files: Files, watch: Any) -> dict[str, torch.Tensor]:
        lanes.append(LateLane(4))
        return ring.Ring(files, {CPU: lanes[-1]}, Pins(), watch).send(moves)

    def all_away(moves: Iterator[Move], way: Any) -> Any:
        return stream._Groups([], [], [], list(moves))

    def state(option: str) -> dict[str, torch.Tensor]:
        loaded = toy.load(tmp_path, toy.quantized(**{option: True}))[0].state_dict()
        return {name: value.detach().reshape(-1).view(torch.uint8) for name, value in loaded.items()}

    wanted = {option: state(option) for option in ("load_in_4bit", "load_in_8bit")}
    monkeypatch.setattr(stream, "_grouped", all_away)
    monkeypatch.setattr(accelerator, "send", send)
    for option, expected in wanted.items():
        found = state(option)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    model, _ = toy.load(tmp_path, toy.meta(torch.float16))
    assert all(torch.equal(value, toy.weights()[name].half()) for name, value in model.state_dict().items())
    assert len(lanes) == 3
