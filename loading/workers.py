"""A few threads that share the jobs of a load, and stop together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

MAX_THREADS = 8  # more do not find more bandwidth
_TO_BEGIN = 1.0  # seconds

Watch = Callable[[int], None]
_Job = TypeVar("_Job")


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


def run_all(
    jobs: Iterator[_Job],
    do: Callable[[_Job], int],
    *,
    threads: int,
    watch: Watch | None,
    abandon: Callable[[], None] = lambda: None,
) -> None:
    """Do all jobs with this thread and ``threads - 1`` more; the first exception stops all and is raised here.

    So does an interrupt: no thread is left when this returns or raises. abandon: called on failure, to wake threads
    that wait for their next job.
    """
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
            abandon()

    def help_out() -> None:
        torch.set_num_threads(1)  # the setting is also one of each thread
        work()

    helpers = [threading.Thread(target=help_out, name="loadstone-load", daemon=True) for _ in range(threads - 1)]
    with one_thread_each():
        try:
            for helper in helpers:
                helper.start()
            work()
            for helper in helpers:
                helper.join()
        except BaseException as error:  # an interrupt between the steps
            failures.append(error)
            abandon()
            raise
        finally:
            join(helpers)
    if failures:
        raise failures[0]


def join(threads: list[threading.Thread]) -> None:
    """Wait for those that were started, and have been told to end; an interrupt meanwhile is raised afterwards.

    Not by `Thread.join`: interrupted, it takes a thread for ended that still runs (CPython 3.8 to 3.12).
    """
    interrupt = None
    while True:
        try:
            begin = time.monotonic()
            while any(_runs(thread, begin) for thread in threads):
                time.sleep(0.0005)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _runs(thread: threading.Thread, begin: float) -> bool:
    """Whether it has not ended. One that an interrupt caught in its start may never begin: it is given a second."""
    late = thread.ident is None and time.monotonic() > begin + _TO_BEGIN
    return not late and thread in threading.enumerate()


def threads_for(shares: int) -> int:
    """How many threads to use for so many shares of work."""
    return min(MAX_THREADS, cores(), shares)


def cores() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
