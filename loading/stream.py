"""A plan executed: weights mapped, cast or copied to where the plan says, file by file, in bounded memory."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from ..errors import IntegrityError
from .arena import DONTNEED, HUGE, POPULATE_READ, Populator, advise, allocate
from .checkpoint import Checkpoint
from .files import Files
from .header import TensorEntry
from .plan import Move, Plan

logger = logging.getLogger("loadstone.loading")

PIECE = 2 * HUGE  # bytes of destination that a thread populates, fills and leaves behind at a time
MAX_THREADS = 4

Watch = Callable[[int], None]
_Job = TypeVar("_Job")


class Streamed(NamedTuple):
    """Loaded tensors by model name, the ties that the bytes confirmed, and what it took, in bytes of the files."""

    tensors: dict[str, torch.Tensor]
    tied: dict[str, str]
    bytes_mapped: int
    bytes_copied: int
    bytes_quantized: int = 0


def stream(plan: Plan, checkpoint: Checkpoint, watch: Watch | None = None) -> Streamed:
    """Execute a plan; ``watch`` is called with the bytes of each piece that is copied or quantized.

    Same dtype on the CPU is a private copy-on-write mapping: nothing is read, and writing to the tensor never reaches
    the file. Raises IntegrityError if a file changed since its header was read.
    """
    files = Files(checkpoint)
    tied, dropped = confirm_ties(plan, files)
    moves = [move for move in plan.moves if move.target not in dropped] if dropped else plan.moves
    tensors: dict[str, torch.Tensor] = {}
    on_cpu: list[Move] = []
    away: list[Move] = []
    to_pack: list[Move] = []
    mapped = copied = quantized = 0
    for move in moves:
        if move.transform == "map":
            tensors[move.target] = files.view(move.entry)
            mapped += move.entry.nbytes
        elif move.transform == "quantize":
            (to_pack if move.device.type == "cpu" else away).append(move)
            quantized += move.entry.nbytes
        elif move.transform != "none":
            (on_cpu if move.device.type == "cpu" else away).append(move)
            copied += move.entry.nbytes
    if on_cpu:
        fresh = allocate([(move.entry.shape, move.dtype) for move in on_cpu])
        tensors.update((move.target, tensor) for move, tensor in zip(on_cpu, fresh, strict=True))
        _fill(on_cpu, fresh, files, watch)
    if to_pack:
        from .quantize import quantize_on_cpu

        tensors.update(quantize_on_cpu(to_pack, plan.tree, files, watch))
    if away:
        from .accelerator import send

        tensors.update(send(away, files, watch))
    changed = checkpoint.changed_files()
    if changed:
        raise IntegrityError(
            f"{', '.join(str(path) for path in changed)} changed while being loaded; "
            "load again when nothing writes there (saving beside it and renaming is safe)"
        )
    return Streamed(tensors, {**plan.tied, **tied}, mapped, copied, quantized)


def confirm_ties(plan: Plan, files: Files) -> tuple[dict[str, str], set[str]]:
    """Ties whose two weights are equal in the checkpoint, and the targets that need not be loaded for it."""
    if not plan.compare:
        return {}, set()
    moves = {move.target: move for move in plan.moves}
    tied: dict[str, str] = {}
    for target, source in plan.compare.items():
        one, other = moves[target], moves[source]
        if one.transform == "none" or _equal(one, other, files):
            tied[target] = source
        else:
            logger.warning(
                "%s: the model ties %r to %r, but the checkpoint holds different values for them; they are loaded as "
                "they are and not tied. Set tie_word_embeddings=False in the config if that is meant.",
                plan.name,
                target,
                source,
            )
    return tied, set(tied)


def _equal(one: Move, other: Move, files: Files) -> bool:
    """Whether two weights will be equal once loaded; pages are read as needed and let go."""
    if one.entry.shape != other.entry.shape or one.dtype != other.dtype:
        return False
    count = one.entry.nbytes // one.entry.dtype.itemsize
    step = PIECE // one.dtype.itemsize
    for begin in range(0, count, step):
        left = files.flat(one.entry, begin, min(begin + step, count))
        right = files.flat(other.entry, begin, min(begin + step, count))
        same = left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        if not same and not torch.equal(left.to(one.dtype), right.to(one.dtype)):
            return False
        advise(left, DONTNEED, inside=True)
        advise(right, DONTNEED, inside=True)
    return True


def _fill(moves: Sequence[Move], tensors: Sequence[torch.Tensor], files: Files, watch: Watch | None) -> None:
    """Cast and copy into fresh CPU tensors, in pieces, with a few threads."""

    def pieces() -> Iterator[tuple[torch.Tensor, TensorEntry, int, int]]:
        for move, tensor in zip(moves, tensors, strict=True):
            flat = tensor.view(-1)
            step = PIECE // move.dtype.itemsize
            for begin in range(0, flat.numel(), step):
                yield flat, move.entry, begin, min(begin + step, flat.numel())

    def fill(piece: tuple[torch.Tensor, TensorEntry, int, int]) -> int:
        flat, entry, begin, end = piece
        target, source = flat[begin:end], files.flat(entry, begin, end)
        advise(source, POPULATE_READ, inside=False)
        populate(target)
        target.copy_(source)
        if entry.offset % entry.dtype.itemsize == 0:  # else ``source`` is no part of the mapping
            advise(source, DONTNEED, inside=True)
        return source.nbytes

    populate = Populator()
    for path in dict.fromkeys(move.entry.file for move in moves):
        files.raw(path, 0, 0)  # map here: workers only look it up
    work = sum(tensor.nbytes for tensor in tensors)
    with one_thread_each():
        run_all(pieces(), fill, threads=threads_for(-(-work // (4 * PIECE))), watch=watch)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch's own threads off meanwhile: each of ours fills a piece alone, so that none waits for the slowest.

    The setting is torch's global one; it is put back, and threads that already run keep theirs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_all(jobs: Iterator[_Job], do: Callable[[_Job], int], *, threads: int, watch: Watch | None) -> None:
    """Do all jobs with this thread and ``threads - 1`` more; the first exception stops all and is raised here."""
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not failures:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                done = do(job)
                if watch is not None:
                    with lock:
                        watch(done)
        except BaseException as error:  # raised again below, in the caller's thread
            failures.append(error)

    def help_out() -> None:
        torch.set_num_threads(1)  # the setting is also one of each thread
        work()

    helpers = [threading.Thread(target=help_out, name="loadstone-load", daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]


def threads_for(shares: int) -> int:
    """How many threads to use for so many shares of work."""
    return min(MAX_THREADS, _cores(), shares)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
