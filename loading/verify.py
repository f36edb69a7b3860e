"""Checking a file of the Hub's cache against the hash that the Hub gave for it.

Notable: the Hub's client compares sizes only. The cache names each blob by what the Hub said: the SHA-256 of large
files, git's SHA-1 of small ones, so that the check needs no request, then or later.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, IntegrityError

_STEP = 8 << 20
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def wants_check(verify: Any) -> bool:
    """The meaning of a ``verify`` argument: "sha256" or True, None or False. Raises ArgumentError for others."""
    if verify is None or isinstance(verify, bool):
        return bool(verify)
    if verify == "sha256":
        return True
    raise ArgumentError(f"verify={verify!r} is unknown; 'sha256' (or True) compares files with the Hub's hashes")


def check_hash(path: Path, what: str) -> None:
    """Compare a file of the cache with its hash. Raises IntegrityError, the file being removed, if it differs.

    what: the file in words. Raises IntegrityError too where the cache does not say the hash.
    """
    blob = Path(os.path.realpath(path))
    wanted = blob.name
    if blob.parent.name != "blobs" or not (_SHA256.fullmatch(wanted) or _GIT.fullmatch(wanted)):
        raise IntegrityError(
            f"{what} cannot be verified: the cache ({path}) does not hold the hash that the Hub gave for it; "
            "leave out verify="
        )
    if _hash_of(blob, git=len(wanted) == 40) == wanted:
        return
    for one in (path, blob):
        one.unlink(missing_ok=True)
    raise IntegrityError(
        f"{what} is not what the Hub says it is: its hash differs from {wanted}. It was removed from the cache; load "
        "again to download it anew"
    )


def _hash_of(path: Path, *, git: bool) -> str:
    """SHA-256 of the content, or SHA-1 of a git blob."""
    summed = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False) if git else hashlib.sha256()
    buffer = memoryview(bytearray(_STEP))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            summed.update(buffer[:count])
    return summed.hexdigest()
