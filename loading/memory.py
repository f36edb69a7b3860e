"""How much memory this process may have, so that what cannot fit is known before it is taken."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ..errors import MemoryLimitError

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_memory(nbytes: int, what: str) -> None:
    """MemoryLimitError if ``what`` takes more bytes than this machine, or this process's group, has in all.

    A system that promises more memory than it has would kill the process later, when it is used.
    """
    limit = memory_limit()
    if nbytes > limit > 0:
        raise MemoryLimitError(
            f"{what} would take {nbytes} bytes, there are {limit} bytes of memory in all; check the sizes in the "
            "configuration, load in a smaller dtype, or use a larger machine"
        )


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
