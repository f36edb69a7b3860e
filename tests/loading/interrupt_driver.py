"""Loads that a real signal interrupts at any moment, in a process of its own; prints what came of them as JSON."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import memory_driver as driver
import torch
from torch import nn

from loadstone.loading import fill, ring
from loadstone.loading.checkpoint import open_checkpoint
from loadstone.loading.load import load_into
from loadstone.loading.source import resolve_source

ROUNDS = 60


class Shot:
    """SIGINT for this process, a random while after it begins, unless it is over by then."""

    def __init__(self, seconds: float) -> None:
        self.over, self.lock = False, threading.Lock()
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self.fire, args=(random.random() * seconds,))
        self.thread.start()

    def fire(self, delay: float) -> None:
        self.wake.wait(delay)
        with self.lock:
            if not self.over:
                os.kill(os.getpid(), signal.SIGINT)

    def end(self) -> None:
        """None comes any more; one that is on its way comes here."""
        with self.lock:
            self.over = True
        self.wake.set()
        time.sleep(0.002)


def one(directory: Path, disable_mmap: bool, seconds: float) -> str:
    """``loaded`` or ``interrupted``, or what is wrong."""
    model = nn.ModuleList(
        [nn.Linear(driver.SIZE, driver.SIZE, bias=False, device="meta", dtype=torch.bfloat16) for _ in range(8)]
    )
    checkpoint = open_checkpoint(resolve_source(directory))
    before, found, shot = dict(model.named_parameters()), "outside", None
    try:
        shot = Shot(seconds)
        try:
            load_into(model, checkpoint, disable_mmap=disable_mmap)
            found = "loaded"
        except KeyboardInterrupt:
            found = "interrupted"
        shot.end()
    except KeyboardInterrupt:  # between the lines above
        pass
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("loadstone")]
    if shot is not None:
        shot.end()
        shot.thread.join()
    now = dict(model.named_parameters())
    whole = not any(parameter.is_meta for parameter in now.values())
    if not whole and not all(now[name] is before[name] for name in before):
        return "half a model"
    return f"threads left: {left}" if left else found


def main() -> None:
    """How often each thing came of the loads, by way."""
    driver.SIZE = 512
    fill.PIECE, ring.SLOT, ring.SLOTS = 1 << 16, 1 << 14, 4
    fill.threads_for = lambda shares: 3
    directory = Path(sys.argv[1]) / "model"
    driver.write(directory, torch.float32)
    counts: dict[str, dict[str, int]] = {}
    for way in ("mapped", "read", "ring"):
        undo: Any = driver.through_the_ring() if way == "ring" else lambda: None
        one(directory, way == "read", 1e6)
        start = time.perf_counter()
        one(directory, way == "read", 1e6)
        seconds = 1.2 * (time.perf_counter() - start)
        for _ in range(ROUNDS):
            found = one(directory, way == "read", seconds)
            counts.setdefault(way, {}).setdefault(found, 0)
            counts[way][found] += 1
        undo()
    print(json.dumps({"counts": counts, "torch threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
