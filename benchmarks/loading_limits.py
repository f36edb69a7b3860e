"""What loading cannot beat on this machine: bare loops over the same bytes, without headers, names, models or checks.

Each limit is the least time of a few ways to do it (sizes of pieces, threads), in the process that is asked. Memory
that is filled is fresh and in huge pages, as no loader can have it before the load.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

HUGE = 2 << 20
POPULATE_READ, POPULATE_WRITE = 22, 23  # Linux 5.14
CORES = len(os.sched_getaffinity(0))
TRIES = [(1, 4 << 20), (min(8, CORES), 4 << 20), (min(16, CORES), 16 << 20)]  # threads and bytes of a piece


def fresh(size: int) -> mmap.mmap:
    """Memory that nothing backs yet, in huge pages where there are any."""
    block = mmap.mmap(-1, max(size, 1) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def warm_memory(size: int) -> None:
    """Touch as much memory as will be needed and give it back: a virtual machine may have to get it from its host."""
    block = fresh(size)
    block.madvise(POPULATE_WRITE)
    block.close()


def drop_cache(files: Sequence[Path]) -> None:
    """The files leave the page cache, as far as nobody has them mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm_cache(files: Sequence[Path]) -> None:
    """The files are in the page cache; what is there stays, for pages of other sizes cost ten times as much to map."""
    buffer = bytearray(8 << 20)
    for file in files:
        with open(file, "rb", buffering=0) as raw:
            while raw.readinto(buffer):
                pass


def least(work: Callable[[int, int], None], prepare: Callable[[], None], tries: int = 3) -> float:
    """Seconds of the fastest of the ways, each tried in turn."""
    best = float("inf")
    for turn in range(tries):
        threads, piece = TRIES[turn % len(TRIES)]
        prepare()
        start = time.perf_counter()
        work(threads, piece)
        best = min(best, time.perf_counter() - start)
    return best


def share(jobs: Iterator[Any], do: Callable[[Any], None], threads: int) -> None:
    """All jobs, by so many threads."""
    lock = threading.Lock()

    def work() -> None:
        torch.set_num_threads(1)
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            do(job)

    helpers = [threading.Thread(target=work) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()


def touch(files: Sequence[Path]) -> float:
    """Seconds to map the files and touch every page."""

    def work(threads: int, piece: int) -> None:
        for file in files:
            with open(file, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY) as block:
                touch_pages([torch.frombuffer(block, dtype=torch.uint8)])

    return least(work, lambda: None)


def touch_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Read a byte of every page, by this thread alone: torch would use more for a long tensor than for short ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for tensor in tensors:
        tensor.detach().view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
    torch.set_num_threads(before)


def read(files: Sequence[Path], *, cold: bool = False) -> float:
    """Seconds to read the files into fresh memory; ``cold``: from the disk, through the page cache or past it."""
    sizes = [file.stat().st_size for file in files]

    def work(threads: int, piece: int, flags: int = 0) -> None:
        descriptors = [os.open(file, os.O_RDONLY | flags) for file in files]
        blocks = [fresh(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE) for size in sizes]
        views = [memoryview(block) for block in blocks]

        def do(job: tuple[int, int, int]) -> None:
            number, begin, end = job
            while begin < min(end, sizes[number]):
                begin += os.preadv(descriptors[number], [views[number][begin:end]], begin)

        def jobs() -> Iterator[tuple[int, int, int]]:
            for number, size in enumerate(sizes):
                if cold and not flags:
                    os.posix_fadvise(descriptors[number], 0, 0, os.POSIX_FADV_WILLNEED)
                for begin in range(0, size, piece):
                    yield number, begin, min(begin + piece, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)

        share(jobs(), do, threads)
        for view, block, descriptor in zip(views, blocks, descriptors, strict=True):
            view.release()
            block.close()
            os.close(descriptor)

    if not cold:
        return least(work, lambda: None)
    through = least(work, lambda: drop_cache(files), tries=2)
    with suppress(OSError, AttributeError):  # not every file system reads past the page cache, nor every system
        return min(through, least(lambda *way: work(*way, os.O_DIRECT), lambda: drop_cache(files), tries=2))
    return through


def cast(files: Sequence[Path], source: torch.dtype, target: torch.dtype) -> float:
    """Seconds to cast all the numbers of the files, mapped, into fresh memory."""

    def work(threads: int, piece: int) -> None:
        maps, blocks, pairs = [], [], []
        for file in files:
            with open(file, "rb") as raw:
                maps.append(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY))
            numbers = torch.frombuffer(maps[-1], dtype=source, count=len(maps[-1]) // source.itemsize)
            blocks.append(fresh(numbers.numel() * target.itemsize))
            pairs.append((numbers, torch.frombuffer(blocks[-1], dtype=target, count=numbers.numel())))
        step = piece // max(source.itemsize, target.itemsize)

        def do(job: tuple[int, int]) -> None:
            number, begin = job
            numbers, room = pairs[number]
            _populate(maps[number], POPULATE_READ, begin * source.itemsize, step * source.itemsize)
            _populate(blocks[number], POPULATE_WRITE, begin * target.itemsize, step * target.itemsize)
            room[begin : begin + step].copy_(numbers[begin : begin + step])

        jobs = ((number, begin) for number, pair in enumerate(pairs) for begin in range(0, pair[0].numel(), step))
        share(jobs, do, threads)

    return least(work, lambda: None)


def read_cast(files: Sequence[Path], source: torch.dtype, target: torch.dtype) -> float:
    """Seconds to read all the numbers of the files, piece by piece, and cast them into fresh memory."""

    def work(threads: int, piece: int) -> None:
        descriptors = [os.open(file, os.O_RDONLY) for file in files]
        counts = [file.stat().st_size // source.itemsize for file in files]
        blocks = [fresh(count * target.itemsize) for count in counts]
        rooms = [torch.frombuffer(block, dtype=target, count=n) for block, n in zip(blocks, counts, strict=True)]
        step, own = piece // max(source.itemsize, target.itemsize), threading.local()

        def do(job: tuple[int, int]) -> None:
            number, begin = job
            if not hasattr(own, "buffer"):
                own.buffer = torch.empty(step, dtype=source)
                own.view = memoryview(own.buffer.view(torch.uint8).numpy())
            room = rooms[number][begin : begin + step]
            _populate(blocks[number], POPULATE_WRITE, begin * target.itemsize, room.nbytes)
            os.preadv(descriptors[number], [own.view[: room.numel() * source.itemsize]], begin * source.itemsize)
            room.copy_(own.buffer[: room.numel()])

        share(((number, begin) for number, n in enumerate(counts) for begin in range(0, n, step)), do, threads)
        for descriptor in descriptors:
            os.close(descriptor)

    return least(work, lambda: None)


def to_device(size: int, device: torch.device) -> float:
    """Seconds to copy so many bytes from pinned memory to a GPU."""
    pinned = torch.empty(min(size, 256 << 20), dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device=device)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        there.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best * size / pinned.numel()


def ceilings(size: int = 256 << 20) -> dict[str, float]:
    """Bytes per second that this machine moves at most, in memory that is there: read plus written."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    found = {"memcpy, B/s": 2 * size / _fastest(lambda: target.copy_(source))}
    numbers, room = source.view(torch.bfloat16), torch.empty(size // 2, dtype=torch.float32)
    found["cast bf16 to fp32, B/s"] = 3 * size / _fastest(lambda: room.copy_(numbers))
    found["fresh memory in huge pages, B/s"] = size / _fastest(lambda: warm_memory(size))
    return found


def _populate(block: mmap.mmap, advice: int, begin: int, size: int) -> None:
    start = begin // mmap.PAGESIZE * mmap.PAGESIZE
    with suppress(OSError):
        block.madvise(advice, start, min(begin + size, len(block)) - start)


def _fastest(call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
