"""Which file systems are better read from end to end than mapped.

A mapping is read where it is touched, a few pages at a time. On a local disk the system's read-ahead makes that cheap;
over a network, or through a FUSE daemon, each touch can be a round trip.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
MEMORY = Path("/proc/meminfo")
_FAR = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs",
        "orangefs", "pvfs2", "wekafs", "panfs", "davfs", "virtiofs", "vboxsf", "vmhgfs", "drvfs", "fuse", "fuseblk",
    }
)  # fmt: skip


def far_file_system(files: Iterable[Path]) -> str | None:
    """The type of the first file system over a network or in FUSE that one of the files lies on, such as ``"nfs4"``.

    None if there is no such file, or the system does not tell (it is Linux that does).
    """
    files = list(files)
    mounts = _mounts() if files else ()
    if not mounts:
        return None
    seen: dict[str, str | None] = {}
    for file in files:
        folder = os.path.dirname(file)
        if folder not in seen or os.path.islink(file):
            seen[folder] = _type_at(os.path.realpath(file), mounts)
        kind = seen[folder]
        if kind is not None and (kind in _FAR or kind.startswith("fuse.")):
            return kind
    return None


def free_memory() -> int | None:
    """Bytes that programs can still have without swapping; None where the system does not tell."""
    try:
        with open(MEMORY) as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError):
        return None


def _mounts() -> Sequence[tuple[str, str]]:
    """(mount point, type), in the order in which they were mounted: of two on one place the later one is seen."""
    try:
        text = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ()
    found = []
    for line in text.splitlines():
        place, _, rest = line.partition(" - ")
        fields, kind = place.split(), rest.split()
        if len(fields) > 4 and kind:
            point = fields[4]
            for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                point = point.replace(code, letter)
            found.append((point, kind[0]))
    return found


def _type_at(path: str, mounts: Sequence[tuple[str, str]]) -> str | None:
    best, kind = -1, None
    for point, name in mounts:
        inside = point == "/" or path == point or path.startswith(f"{point}/")
        if inside and len(point) >= best:
            best, kind = len(point), name
    return kind
