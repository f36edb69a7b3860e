"""Reading past the page cache: the same bytes wherever they lie, and what happens where a system refuses."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loading import memory_driver
from loadstone.errors import IntegrityError, ReadError
from loadstone.loading import reading
from loadstone.loading.arena import HUGE, PAGE, allocate
from loadstone.loading.load import load_into

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")
SIZE = 6 * PAGE + 100


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose file system reads past the page cache, of bytes that differ."""
    path = tmp_path_factory.mktemp("direct") / "model.safetensors"
    save_file({"t": torch.randint(0, 255, (SIZE,), dtype=torch.uint8)}, path)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the file system of temporary files has no O_DIRECT: {error}")
    return path


@pytest.fixture(autouse=True)
def _cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the page cache, however small it is."""
    monkeypatch.setattr(reading, "_resident", lambda *_: False)
    monkeypatch.setattr(reading, "DIRECT_LEAST", 1)


@pytest.fixture
def direct_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read past the page cache."""
    counts: list[int] = []
    original = reading.Reader._past_cache

    def past(self: Any, *arguments: Any) -> int:
        counts.append(original(self, *arguments))
        return counts[-1]

    monkeypatch.setattr(reading.Reader, "_past_cache", past)
    return counts


def large(directory: Path, dtype: torch.dtype, *, disable_mmap: bool = True) -> None:
    """A load of some megabytes, which must be right."""
    tensors = {f"t{number}": torch.randn(HUGE // 4 + number) for number in range(3)}
    save_file(tensors, directory / "model.safetensors")
    model = toy.Bag(tensors, dtype)
    load_into(model, toy.opened(directory), strict=True, disable_mmap=disable_mmap)
    assert all(torch.equal(getattr(model, name).detach(), tensor.to(dtype)) for name, tensor in tensors.items())


def memory(size: int, start: int) -> torch.Tensor:
    """Bytes that start so far into a page."""
    room = torch.zeros(size + 2 * PAGE, dtype=torch.uint8)
    begin = (start - room.data_ptr()) % PAGE
    return room[begin : begin + size]


@given(begin=st.integers(0, SIZE), size=st.integers(0, SIZE), elsewhere=st.integers(0, 3))
def test_any_bytes_into_any_memory(file: Path, begin: int, size: int, elsewhere: int) -> None:
    whole = file.read_bytes()
    size = min(size, len(whole) - begin)
    reader = reading.Reader(toy.opened(file.parent), direct=True)
    target = memory(size, begin + elsewhere)
    reader.into(target, file, begin)
    assert target.numpy().tobytes() == whole[begin : begin + size]
    reader.close()
    assert not reader._open


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metadata", ["", "x", "x" * 8, "x" * 3000])
def test_models(tmp_path: Path, file: Path, direct_bytes: list[int], dtype: torch.dtype, metadata: str) -> None:
    """Wherever the header ends: what has a place of its own lies in its page as in the file, and comes whole."""
    tensors = {"a": torch.randn(3, HUGE // 4 + 5), "b": torch.randn(7), "c": torch.randn(2 * HUGE // 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"m": metadata} if metadata else None)
    model = toy.Bag(tensors, dtype)
    report = load_into(model, toy.opened(tmp_path), strict=True, disable_mmap=True)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(model, name).detach(), tensor.to(dtype))
    assert report.bytes_copied == sum(tensor.nbytes for tensor in tensors.values())
    large = tensors["a"].nbytes + tensors["c"].nbytes
    assert large - 6 * PAGE <= sum(direct_bytes) <= large


def test_only_what_is_read_on_request_on_this_machine(tmp_path: Path, file: Path, direct_bytes: list[int]) -> None:
    large(tmp_path, torch.bfloat16, disable_mmap=False)
    assert not direct_bytes
    large(tmp_path, torch.bfloat16)
    assert sum(direct_bytes) > HUGE


def test_what_is_in_the_page_cache_comes_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_bytes: list[int]
) -> None:
    monkeypatch.setattr(reading, "_resident", lambda *_: True)
    large(tmp_path, torch.bfloat16)
    assert not direct_bytes


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_file_system_that_refuses(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, direct_bytes: list[int], where: str
) -> None:
    """It is asked once for each file."""
    asked, original = [], reading._read if where == "read" else os.open

    def refuse(first: Any, *rest: Any) -> int:
        flags = rest[0] if where == "open" else flags_of(first)
        if flags & os.O_DIRECT:
            asked.append(first)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(first, *rest)

    monkeypatch.setattr(*((reading, "_read") if where == "read" else (os, "open")), refuse)
    large(tmp_path, torch.float32)
    assert asked
    assert sum(direct_bytes) == 0
    assert len(asked) <= 4  # one for each thread that came before the answer


def flags_of(descriptor: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETFL)


def test_a_disk_that_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = reading._read

    def fail(descriptor: int, *rest: Any) -> int:
        if flags_of(descriptor) & os.O_DIRECT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(descriptor, *rest)

    monkeypatch.setattr(reading, "_read", fail)
    reader = reading.Reader(toy.opened(file.parent), direct=True)
    with pytest.raises(ReadError, match="cannot be read") as caught:
        reader.into(memory(4 * PAGE, 0), file, 0)
    assert caught.value.errno == errno.EIO
    reader.close()


@pytest.mark.parametrize("left", [0, PAGE, PAGE + 1, 3 * PAGE - 1])
def test_a_file_that_was_cut(tmp_path: Path, file: Path, left: int) -> None:
    """After it was opened; before, its stamp tells."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file.read_bytes())
    reader = reading.Reader(toy.opened(tmp_path), direct=True)
    reader.into(memory(2 * PAGE, 0), path, 0)
    os.truncate(path, left)
    with pytest.raises(IntegrityError, match="was cut while it was read"):
        reader.into(memory(4 * PAGE, 0), path, 0)
    reader.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is in the page cache")
def test_the_page_cache_stays_as_it_was(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.randn(4 * HUGE // 4)}, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if reading._resident(descriptor, 2 * HUGE):
        pytest.skip("this file system does not say what it has in memory")
    model = toy.Bag({"t": torch.randn(4 * HUGE // 4)}, None)
    load_into(model, toy.opened(tmp_path), disable_mmap=True)
    assert not reading._resident(descriptor, 2 * HUGE)
    os.close(descriptor)


def test_to_a_device(tmp_path: Path, file: Path, direct_bytes: list[int]) -> None:
    undo = memory_driver.through_the_ring()
    try:
        large(tmp_path, torch.bfloat16)
    finally:
        undo()
    assert sum(direct_bytes) > 2 * HUGE


@given(starts=st.lists(st.integers(0, PAGE - 1), min_size=3, max_size=3))
def test_tensors_start_where_they_are_asked_to(starts: list[int]) -> None:
    starts = [start // 4 * 4 for start in starts]
    wanted = [((HUGE // 4 + 3,), torch.float32), ((5,), torch.float32), ((2 * HUGE,), torch.uint8)]
    for (shape, dtype), start, tensor in zip(wanted, starts, allocate(wanted, starts), strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        if tensor.nbytes >= HUGE:
            assert tensor.data_ptr() % HUGE == start
        tensor.fill_(1)
