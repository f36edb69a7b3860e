"""Runs a function on several processes that form a process group, and brings back what each returns or raises."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TESTS = str(Path(__file__).parents[1])
TIMEOUT = 60.0  # seconds that ranks wait for each other, and may take in all beyond what starting them takes


class Raised(str):
    """What a rank raised: the type's name and the message."""

    kind: type[BaseException]


def run(function: Callable[..., Any], count: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """``function(rank, *args)`` on ``count`` ranks; by rank what it returned, a `Raised` if it raised, None if the
    process died. The function belongs to a module that a fresh process can import."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        ranks = [
            context.Process(target=_rank, args=(function, rank, count, place, timeout, args), daemon=True)
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        until = time.monotonic() + 3 * timeout
        for process in ranks:
            process.join(max(0.0, until - time.monotonic()))
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank in late:
            ranks[rank].kill()
            ranks[rank].join()
        assert not late, f"ranks {late} did not come to an end"
        return [_result(Path(place, f"{rank}.pt")) for rank in range(count)]


def results(function: Callable[..., Any], count: int, *args: Any) -> list[Any]:
    """`run`, where no rank may raise or die."""
    found = run(function, count, *args)
    for rank, value in enumerate(found):
        assert not isinstance(value, Raised), f"rank {rank}: {value}"
    return found


def _result(file: Path) -> Any:
    if not file.exists():
        return None
    kind, value = torch.load(file, weights_only=False)
    return Raised(value) if kind == "raised" else value


def _rank(function: Callable[..., Any], rank: int, count: int, place: str, timeout: float, args: Any) -> None:
    import traceback

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(f"{place}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
    try:
        told = ("returned", function(rank, *args))
    except BaseException as error:
        told = ("raised", f"{type(error).__name__}: {error}")
        traceback.print_exc(file=sys.stderr)
    torch.save(told, f"{place}/{rank}.tmp")
    os.replace(f"{place}/{rank}.tmp", f"{place}/{rank}.pt")
    os._exit(0)  # without waiting for the others, some of which may be gone
