"""The order of things on a GPU, proved without one: streams and events that keep vector clocks, and memory that is
watched. Two uses of the same bytes, one of them a write, must be ordered by a stream or by an event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loadstone.loading import accelerator, ring
from loadstone.loading.checkpoint import Checkpoint
from loadstone.loading.files import Files
from loadstone.loading.header import read_header
from loadstone.loading.plan import Move
from loadstone.loading.reading import Reader

Clock = dict[Any, int]


class Actor:
    """A stream of a GPU, or a thread of the host: its own steps, and those of others that it knows to be over."""

    def __init__(self) -> None:
        self.clock: Clock = {}

    def step(self) -> tuple[Actor, int]:
        self.clock[self] = self.clock.get(self, 0) + 1
        return self, self.clock[self]

    def learn(self, clock: Clock) -> None:
        for actor, count in clock.items():
            self.clock[actor] = max(self.clock.get(actor, 0), count)

    def knows(self, moment: tuple[Actor, int]) -> bool:
        return self.clock.get(moment[0], 0) >= moment[1]


class World:
    """What `accelerator` and `ring` use of torch.cuda, and every use of memory, checked."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.here = threading.local()
        self.uses: dict[int, list[tuple[tuple[Actor, int], bool]]] = {}
        self.races: list[str] = []
        world = self

        class Stream(Actor):
            def wait_stream(self, other: Actor) -> None:
                with world.lock:
                    self.learn(other.clock)

            def wait_event(self, event: Any) -> None:
                with world.lock:
                    self.learn(event.clock)

            def synchronize(self) -> None:
                with world.lock:
                    world.host().learn(self.clock)

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.clock: Clock = {}

            def record(self, stream: Actor) -> None:
                with world.lock:
                    self.clock = dict(stream.clock)

            def synchronize(self) -> None:
                with world.lock:
                    world.host().learn(self.clock)

        self.Stream, self.Event = Stream, Event
        self.default = Stream()

    def host(self) -> Actor:
        """This thread; what it issues to a stream, the stream does after it."""
        if not hasattr(self.here, "actor"):
            self.here.actor = Actor()
        return self.here.actor

    def current_stream(self) -> Actor:
        return getattr(self.here, "stream", self.default)

    @contextmanager
    def stream(self, stream: Actor) -> Iterator[None]:
        before, self.here.stream = self.current_stream(), stream
        yield
        self.here.stream = before

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def use(self, tensor: torch.Tensor, write: bool, actor: Actor) -> None:
        with self.lock:
            uses = self.uses.setdefault(tensor.untyped_storage().data_ptr(), [])
            for moment, wrote in uses:
                if (write or wrote) and not actor.knows(moment):
                    self.races.append("write" if write else "read")
            uses.append((actor.step(), write))

    def on_stream(self, *tensors: tuple[torch.Tensor, bool]) -> None:
        """Work issued by this thread to the current stream."""
        with self.lock:
            stream = self.current_stream()
            stream.learn(self.host().clock)
            for tensor, write in tensors:
                self.use(tensor, write, stream)


def carry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[World, bool]:
    """A load through the real lane and ring; whether the tensors are right too."""
    world = World()
    tensors = {f"{number}": torch.randn(3000 + number) for number in range(12)}
    save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.from_headers("x", [read_header(tmp_path / "x.safetensors")])
    for name in ("Stream", "Event", "stream", "device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(world, name))
    copy = torch.Tensor.copy_

    def watched_copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        world.on_stream((source, False), (self, True))
        return copy(self, source)

    read = Reader.into

    def watched_read(self: Reader, target: torch.Tensor, file: Path, begin: int) -> None:
        with world.lock:
            world.use(target, True, world.host())
        read(self, target, file, begin)

    monkeypatch.setattr(torch.Tensor, "copy_", watched_copy)
    monkeypatch.setattr(Reader, "into", watched_read)
    # A thread that takes a load over from another knows what that one did: they pass a lock.
    notify = threading.Condition.notify_all
    shared: Clock = {}

    def notify_all(self: threading.Condition) -> None:
        with world.lock:
            for actor, count in world.host().clock.items():
                shared[actor] = max(shared.get(actor, 0), count)
        notify(self)

    wait_for = threading.Condition.wait_for

    def waited(self: threading.Condition, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        result = wait_for(self, predicate, timeout)
        with world.lock:
            world.host().learn({actor: count for actor, count in shared.items() if not hasattr(actor, "wait_event")})
        return result

    monkeypatch.setattr(threading.Condition, "notify_all", notify_all)
    monkeypatch.setattr(threading.Condition, "wait_for", waited)
    monkeypatch.setattr(ring, "SLOT", 4096)
    monkeypatch.setattr(ring, "SLOTS", 5)
    monkeypatch.setattr(ring, "cores", lambda: 3)
    device = torch.device("cpu")
    moves = [Move(name, entry, device, dtype, "cast") for name, entry in checkpoint.entries.items()]
    with Files(checkpoint) as files:
        lane = accelerator.CudaLane(device, ring.slot_size(moves))
        made = ring.Ring(files, {device: lane}, lambda size: torch.empty(size, dtype=torch.uint8), None).send(moves)
    monkeypatch.undo()
    for tensor in made.values():  # the caller uses them on its own stream, without waiting for anything
        with world.lock:
            world.use(tensor, False, world.default)
    right = all(torch.equal(made[name], tensor.to(dtype)) for name, tensor in tensors.items())
    return world, right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype) -> None:
    world, right = carry(monkeypatch, tmp_path, dtype)
    assert right
    assert len(world.uses) > 12
    assert world.races == []


def test_a_slot_filled_too_early_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The check of the check: the host does not wait until the device has what a slot holds."""
    original = accelerator.CudaLane.carry
    monkeypatch.setattr(
        accelerator.CudaLane, "carry", lambda self, octets, unpack: (original(self, octets, unpack), lambda: None)[1]
    )
    assert "write" in carry(monkeypatch, tmp_path)[0].races


def test_a_place_on_the_device_filled_too_early_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the side stream does not wait until the caller's has taken out what a place holds."""
    original = accelerator.CudaLane.carry

    def careless(self: Any, octets: torch.Tensor, unpack: Any) -> Any:
        self._done = [None] * len(self._done)
        return original(self, octets, unpack)

    monkeypatch.setattr(accelerator.CudaLane, "carry", careless)
    assert "write" in carry(monkeypatch, tmp_path)[0].races
