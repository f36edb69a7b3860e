"""Replacing a directory's files as one step: a crash leaves all the old ones or all the new ones.

The new files are written and synced in a staging directory beside the target. A new target is then one rename. In
an existing target, if nothing old is in the way, the files are moved in, the one that makes them a checkpoint last.
Otherwise the staging directory is completed with hard links to the files to be kept and exchanged with the target in
one step (Linux). Where that is impossible files are replaced one by one, and a warning says so.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoadstoneError, PathError, WriteError

logger = logging.getLogger(__name__)

_MOST_KEPT = 4096  # more files to be kept than this is no checkpoint directory: they are not linked over
_EXCHANGE = 2  # RENAME_EXCHANGE
_HERE = -100  # AT_FDCWD


@dataclass(frozen=True)
class Contents:
    """What a directory is to hold: ``write(staging)`` makes the new files, ``stale(name)`` tells which old ones go.

    Names may have folders (``sub/a.py``); of old files only those at the top are asked about. ``write`` returns the
    names of its files in the order in which they may appear, in groups; within a group, new names come before names
    that replace a file. The last one makes the whole valid.
    """

    write: Callable[[Path], Sequence[Sequence[str]]]
    stale: Callable[[str], bool]


class _ExchangeImpossible(Exception):
    """Why the target cannot be exchanged as a whole."""


def replace_contents(directory: str | os.PathLike[str], contents: Contents) -> list[str]:
    """Put new files into ``directory``, made if missing; other files and subdirectories in it stay. Names written.

    Raises PathError if it is a file, WriteError (no space, no permission) with the directory as it was before.
    """
    with _told(f"cannot save to {os.fspath(directory)!r}"):
        target = Path(os.path.realpath(directory))
        if os.path.lexists(target) and not target.is_dir():
            raise PathError(f"cannot save to {os.fspath(directory)!r}: it is a file, a directory is needed")
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target)
        obstacle = _obstacle(target) if target.exists() else None
        with _staging(target, inside=obstacle is not None) as staging:
            with _told(f"nothing was saved to {str(target)!r}, which is as it was before"):
                groups = contents.write(staging)
                sync_directory(staging)
            _commit(target, staging, groups, contents.stale, obstacle)
    return [name for group in groups for name in group]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A WriteError that ``what`` failed, for what the system refuses; errors that already say it pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, LoadstoneError) or not error.errno:
            raise
        raise WriteError.of(error, what) from error


def clear_leftovers(target: Path) -> None:
    """Remove staging directories of saves to ``target`` that were killed; those of running ones are locked."""
    for parent, prefix in ((target.parent, _prefix(target)), (target, _prefix(None))):
        with suppress(OSError):
            for name in os.listdir(parent):
                if name.startswith(prefix) and _is_token(name[len(prefix) :]):
                    _remove_if_abandoned(parent / name)


def sync_directory(directory: Path) -> None:
    """Make the entries of a directory durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _prefix(target: Path | None) -> str:
    return f".{target.name}.saving-" if target is not None else ".saving-"


def _is_token(text: str) -> bool:
    return len(text) == 32 and all(char in "0123456789abcdef" for char in text)


@contextmanager
def _staging(target: Path, *, inside: bool) -> Iterator[Path]:
    """A new directory beside (or inside) the target, locked for as long as this process works on it."""
    parent, prefix = (target, _prefix(None)) if inside else (target.parent, _prefix(target))
    path, descriptor = _locked_directory(parent, prefix)
    try:
        yield path
    finally:
        if path.exists():
            shutil.rmtree(path, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _locked_directory(parent: Path, prefix: str) -> tuple[Path, int | None]:
    while True:
        path = parent / f"{prefix}{uuid.uuid4().hex}"
        path.mkdir()
        with suppress(BlockingIOError):
            descriptor = _lock(path)
            if path.exists():
                return path, descriptor
        # Another save took it for a leftover before it was locked: make the next one.


def _lock(directory: Path) -> int | None:
    """An open descriptor that holds the only lock on a directory; None where directories cannot be locked.

    BlockingIOError if another process, or another save of this one, holds it.
    """
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_abandoned(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        return
    try:
        descriptor = _lock(path)  # the system drops the owner's lock with the owner
    except BlockingIOError:
        return
    if descriptor is not None:
        logger.info("Removing %s, left by a save that was killed.", path)
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _obstacle(target: Path) -> str | None:
    """Why ``target`` cannot be exchanged with a directory beside it; None if it may be."""
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return f"no files may be made in {str(target.parent)!r}"
    if os.path.ismount(target):
        return "it is a mount point"
    with suppress(FileNotFoundError):
        if Path(os.getcwd()).is_relative_to(target):
            return "it is, or holds, the working directory of this process"
    if not sys.platform.startswith("linux"):
        return "this system cannot exchange directories"
    return None


def _commit(
    target: Path, staging: Path, groups: Sequence[Sequence[str]], stale: Callable[[str], bool], obstacle: str | None
) -> None:
    """Make the staged files the target's."""
    if not target.exists():
        with suppress(OSError):
            os.rename(staging, target)
        if not staging.exists():
            sync_directory(target.parent)
            return
        target.mkdir(exist_ok=True)  # the rename is not possible here, or someone else made it meanwhile
    new = {name for group in groups for name in group}
    in_the_way = [name for name in os.listdir(target) if name in new or stale(name)]
    in_the_way += [name for name in new if "/" in name and os.path.lexists(target / name)]
    if in_the_way and obstacle is None:
        try:
            _exchange_whole(target, staging, lambda name: name in new or ("/" not in name and stale(name)))
            return
        except _ExchangeImpossible as reason:
            obstacle = str(reason)
    if in_the_way:
        logger.warning(
            "Saving to %s file by file, because %s: a crash just now may leave a mix of old and new files.",
            target,
            obstacle,
        )
    _move_into(target, staging, groups, [name for name in in_the_way if name not in new])


def _move_into(target: Path, staging: Path, groups: Sequence[Sequence[str]], stale: Sequence[str]) -> None:
    """Move staged files into the target in order, then remove what is stale."""
    for group in groups:
        for name in sorted(group, key=lambda name: os.path.lexists(target / name)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, target / name)
        sync_directory(target)
    for name in sorted(stale, key=lambda name: "-of-" in name):  # whole files and indices first: they name the others
        with suppress(FileNotFoundError):
            os.unlink(target / name)
    sync_directory(target)


def _exchange_whole(target: Path, staging: Path, gone: Callable[[str], bool]) -> None:
    """Complete ``staging`` with links to what stays, then exchange it with ``target`` and remove the old one."""
    written = set(os.listdir(staging))
    try:
        _link_tree(target, staging, gone, [_MOST_KEPT])
        _copy_ownership(target, staging)
        os.utime(staging)
        sync_directory(staging)
    except OSError as error:
        _unlink_all_but(staging, written)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise _ExchangeImpossible(f"its other files cannot be linked ({error.strerror or error})") from error
    old = None
    with suppress(BlockingIOError):
        old = _lock(target)  # so that no other save takes it for a leftover while it is being emptied
    try:
        _exchange(staging, target)
    except OSError as error:
        if old is not None:
            os.close(old)
        _unlink_all_but(staging, written)
        raise _ExchangeImpossible(f"the directory cannot be exchanged with a new one ({error.strerror})") from error
    try:
        sync_directory(target.parent)
        _bring_late_files(staging, target, gone)
        shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        logger.warning("The checkpoint is saved to %s, but tidying up failed: %s", target, error)
    finally:
        if old is not None:
            os.close(old)


def _link_tree(
    source: Path, destination: Path, skip: Callable[[str], bool], budget: list[int], folder: str = ""
) -> None:
    """Hard links in ``destination`` to all files below ``source`` but those that ``skip(name)`` says."""
    with os.scandir(source) as entries:
        for entry in entries:
            if skip(folder + entry.name):
                continue
            budget[0] -= 1
            if budget[0] < 0:
                raise OSError(errno.EMLINK, f"more than {_MOST_KEPT} other files are there")
            if entry.is_dir(follow_symlinks=False):
                made = destination / entry.name
                made.mkdir(exist_ok=True)
                _link_tree(Path(entry.path), made, skip, budget, f"{folder}{entry.name}/")
                _copy_ownership(Path(entry.path), made)
                sync_directory(made)
            else:
                os.link(entry.path, destination / entry.name, follow_symlinks=False)


def _copy_ownership(source: Path, destination: Path) -> None:
    """Owner, mode, times and extended attributes of a directory; OSError if this user may not give them."""
    want, have = os.stat(source), os.stat(destination)
    if (want.st_uid, want.st_gid) != (have.st_uid, have.st_gid):
        os.chown(destination, want.st_uid, want.st_gid)
    shutil.copystat(source, destination)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories' names in one step (renameat2 with RENAME_EXCHANGE); OSError where that is unsupported."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError) as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    if renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), ctypes.c_uint(_EXCHANGE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _bring_late_files(old: Path, new: Path, gone: Callable[[str], bool], folder: str = "") -> None:
    """Move files that someone made or replaced in ``old`` after it was linked over, so that none is lost."""
    with os.scandir(old) as entries:
        for entry in entries:
            if gone(folder + entry.name):
                continue
            place = new / entry.name
            if entry.is_dir(follow_symlinks=False) and place.is_dir():
                _bring_late_files(Path(entry.path), place, gone, f"{folder}{entry.name}/")
            elif not os.path.lexists(place) or not os.path.samestat(entry.stat(follow_symlinks=False), place.lstat()):
                os.replace(entry.path, place)


def _unlink_all_but(directory: Path, kept: set[str]) -> None:
    for name in os.listdir(directory):
        if name not in kept:
            path = directory / name
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
