"""How long a call takes on a device, without what the call before left in its cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU


@lru_cache(maxsize=4)
def _flusher(device: torch.device) -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


def times(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    """Seconds of ``count`` calls, by the device's own clock where it is a GPU, whose caches are emptied before each.

    The call is warm: compile and allocate in a call before. Work is queued ahead of the GPU, so the time that Python
    takes to launch shows only where it is longer than emptying the cache.
    """
    if device.type != "cuda":
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds
    flusher = _flusher(device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    with torch.cuda.device(device):
        for start_mark, end_mark in marks:
            flusher.zero_()
            start_mark.record()
            call()
            end_mark.record()
        torch.cuda.synchronize()
    return [start_mark.elapsed_time(end_mark) / 1e3 for start_mark, end_mark in marks]
