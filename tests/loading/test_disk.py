"""Files mapped into memory: larger than the machine's, private, and given back after use."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loadstone.loading.checkpoint import Checkpoint
from loadstone.loading.disk import give_back, map_file
from loadstone.loading.files import Files
from loadstone.loading.header import read_header

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def mapped_pages(name: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]


def resident(name: str, what: str = "Rss") -> int:
    """Bytes of a file's mappings that are in memory; of what this process wrote to it: ``Anonymous``."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            inside = name in line
        elif inside and line.startswith(f"{what}:"):
            total += int(line.split()[1]) << 10
    return total


def sparse(path: Path, size: int) -> Path:
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return path


@linux
def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    header = read_header(sparse(tmp_path / "large.safetensors", 1 << 42))
    checkpoint = Checkpoint.from_headers("large", [header])
    weight = Files(checkpoint).view(checkpoint.entries["w"])
    assert weight.nbytes == 1 << 42
    assert weight[-1].item() == 0
    weight[-1] = 3  # private: it can be written to, and the file stays as it is
    assert weight[-1].item() == 3
    assert Files(checkpoint).view(checkpoint.entries["w"])[-1].item() == 0


@linux
def test_a_mapping_ends_with_the_last_tensor_on_it(tmp_path: Path) -> None:
    path = tmp_path / "ends.safetensors"
    save_file({"a": torch.arange(10.0), "b": torch.ones(3)}, path)
    part = map_file(path, path.stat().st_size)[8:16]
    gc.collect()
    assert len(mapped_pages("ends.safetensors")) == 1
    assert part.nbytes() == 8
    del part
    gc.collect()
    assert not mapped_pages("ends.safetensors")


def test_a_file_that_is_shorter_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    with pytest.raises((OSError, RuntimeError)):
        map_file(path, 101)
    with pytest.raises((OSError, RuntimeError)):
        map_file(tmp_path / "none", 1)


@linux
def test_pages_are_given_back_unless_they_were_written_to(tmp_path: Path) -> None:
    path = tmp_path / "back.safetensors"
    values = torch.randn(2, 1 << 20)
    save_file({"w": values}, path)
    checkpoint = Checkpoint.from_headers("x", [read_header(path)])
    clean, written = Files(checkpoint).view(checkpoint.entries["w"])
    assert torch.equal(torch.stack((clean, written)), values)
    written[600_000] = 7
    before = resident("back.safetensors")
    assert before > clean.nbytes
    looked = give_back([clean, written])
    if not looked:
        pytest.skip("this system does not say which pages were written to")
    assert resident("back.safetensors") <= before - clean.nbytes + (1 << 16)
    assert resident("back.safetensors", "Anonymous") > 0
    assert written[600_000].item() == 7  # the page of this process's own stayed
    assert torch.equal(clean, values[0])
    own = torch.ones(1 << 20)  # memory that no file backs is never let go
    give_back([own])
    assert bool((own == 1).all())
