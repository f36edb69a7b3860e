"""How much memory this process may have, so that what cannot fit is known before it is taken."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import MemoryLimitError

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_memory(nbytes: int, what: str, device: torch.device | None = None) -> None:
    """MemoryLimitError if ``what`` takes more bytes than this machine, or this process's group, has in all.

    A system that promises more memory than it has would kill the process later, when it is used. An accelerator does
    not promise; with one as ``device`` the error is for what neither it and its like nor the machine have.
    """
    limit = memory_limit()
    if nbytes > limit > 0 and device is not None and device.type != "cpu":
        limit = max(limit, _accelerators_total(device))
    if nbytes > limit > 0:
        raise MemoryLimitError(
            f"{what} would take {nbytes} bytes, there are {limit} bytes of memory in all; check the sizes in the "
            "configuration, load in a smaller dtype, or use a larger machine"
        )


def _accelerators_total(device: torch.device) -> int:
    """Bytes of all accelerators, taken to be like this one; 0 for one that has no memory of its own."""
    module: Any = getattr(torch, device.type, None)
    return int(module.mem_get_info(device)[1]) * module.device_count() if hasattr(module, "mem_get_info") else 0


@lru_cache(maxsize=1)
def memory_limit() -> int:
    """Bytes of memory and swap, less where a control group allows less; 0 where the system does not say."""
    total = 0
    with suppress(OSError, ValueError):
        sizes = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        total = sum(int(sizes[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal") if name in sizes)
    if not total:
        with suppress(OSError, ValueError, AttributeError):
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CGROUPS:
        with suppress(OSError, ValueError):
            total = min(total, int(path.read_text()))
    return total
