"""Loads a checkpoint of half a gigabyte every way, in a process of its own, and prints the private memory that it took.

The file is a hole: it takes no room on the disk, and reads as zeros.
"""

from __future__ import annotations

import gc
import json
import math
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loadstone import BitsAndBytesConfig
from loadstone.loading import accelerator, ring, stream
from loadstone.loading.checkpoint import open_checkpoint
from loadstone.loading.load import load_into
from loadstone.loading.source import resolve_source
from loadstone.quant import find_quantizer

SIZE, COUNT = 4096, 8
CODES = {torch.float32: "F32", torch.bfloat16: "BF16"}
NF4, INT8 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}
WAYS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "mapped": (torch.float32, torch.float32, {}),
    "read": (torch.float32, torch.float32, {"disable_mmap": True}),
    "cast down": (torch.float32, torch.bfloat16, {}),
    "cast up": (torch.bfloat16, torch.float32, {}),
    "read and cast down": (torch.float32, torch.bfloat16, {"disable_mmap": True}),
    "read and cast up": (torch.bfloat16, torch.float32, {"disable_mmap": True}),
    "NF4": (torch.bfloat16, torch.bfloat16, {"quantize": NF4}),
    "int8": (torch.bfloat16, torch.bfloat16, {"quantize": INT8}),
    "read, NF4": (torch.bfloat16, torch.bfloat16, {"quantize": NF4, "disable_mmap": True}),
    "ring": (torch.bfloat16, torch.float32, {"ring": True}),
    "ring, NF4": (torch.bfloat16, torch.bfloat16, {"quantize": NF4, "ring": True}),
}


def write(directory: Path, dtype: torch.dtype) -> None:
    """A checkpoint of holes."""
    directory.mkdir()
    size = SIZE * SIZE * dtype.itemsize
    header = json.dumps(
        {
            f"{number}.weight": {"dtype": CODES[dtype], "shape": [SIZE, SIZE],
                                 "data_offsets": [number * size, (number + 1) * size]}
            for number in range(COUNT)
        }
    ).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + COUNT * size)


class Peak:
    """The most private memory of the process while it is inside, in bytes beyond what it had."""

    def __enter__(self) -> Peak:
        self.before = self.most = self.now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.most = max(self.most, self.now())

    def watch(self) -> None:
        while not self.stop.wait(0.002):
            self.most = max(self.most, self.now())

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Lane:
    """A device that is this process's own memory, without a wait."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def carry(self, octets: torch.Tensor, unpack: Callable[[torch.Tensor], None]) -> Callable[[], None]:
        unpack(octets)
        return lambda: None

    def finish(self) -> None:
        pass


def through_the_ring() -> Callable[[], None]:
    """Have everything go the way of accelerators; undone by what this returns."""
    before = stream._grouped, accelerator.send
    stream._grouped = lambda moves, way: stream._Groups([], [], [], list(moves))
    accelerator.send = lambda moves, files, watch: ring.Ring(
        files, {torch.device("cpu"): Lane()}, lambda size: torch.empty(size, dtype=torch.uint8), watch
    ).send(list(moves))

    def undo() -> None:
        stream._grouped, accelerator.send = before

    return undo


def measure(directory: Path, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, int]:
    """Peak, and what the weights take, in bytes."""
    options = dict(options)
    model = nn.ModuleList([nn.Linear(SIZE, SIZE, bias=False, device="meta", dtype=dtype) for _ in range(COUNT)])
    if (config := options.pop("quantize", None)) is not None:
        find_quantizer("driver", None, BitsAndBytesConfig(**config)).replace(model)
    undo = through_the_ring() if options.pop("ring", False) else lambda: None
    checkpoint = open_checkpoint(resolve_source(directory))
    gc.collect()
    with Peak() as peak:
        load_into(model, checkpoint, strict=True, **options)
    undo()
    held = sum(math.prod(t.shape) * t.element_size() for t in model.state_dict().values())
    return {"peak": peak.most - peak.before, "weights": held}


def main() -> None:
    """Print {way: peak and weights} as JSON."""
    room = Path(sys.argv[1])
    for dtype in CODES:
        write(room / CODES[dtype], dtype)
    found = {}
    for name, (stored, wanted, options) in WAYS.items():
        found[name] = measure(room / CODES[stored], wanted, options)
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
