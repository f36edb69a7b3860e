"""Where a checkpoint's files come from: one local directory, or one Hub repository at one commit."""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ArgumentError, MissingWeightsError, NotFoundError, PathError, RepoIdError, nearest
from .proxies import checked_proxies
from .verify import wants_check

if TYPE_CHECKING:
    from .arrivals import Arrivals
    from .header import Header

HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder", "verify",
)  # fmt: skip
"""Keywords of `resolve_source` that matter for a Hub repository."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_DRIVE = re.compile(r"[A-Za-z]:")
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_FILE_ENDINGS = (".safetensors", ".json")
_SHOWN = 12


class Expected(NamedTuple):
    """Headers of files to come, by name, and what brings them."""

    headers: dict[str, Header]
    arrivals: Arrivals


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """One place that checkpoint files come from; every file of one Source belongs to the same version.

    File names are plain names or relative paths inside the checkpoint, anything else is a PathError.
    ``name`` is what the caller gave, ``commit`` the 40-digit commit of a Hub repository (None for a directory).
    """

    name: str
    commit: str | None

    @abstractmethod
    def find(self, filename: str) -> Path | None:
        """Local path of one file, downloaded if need be; None if the checkpoint has no such file."""

    @abstractmethod
    def fetch(self, filenames: Sequence[str]) -> list[Path]:
        """Local paths of several weight files, in order; MissingWeightsError names all that are not there."""

    def expect(self, filenames: Sequence[str]) -> Expected | None:
        """Headers of weight files that are still to be downloaded, and their arrivals; None: `fetch` has them all.

        Nothing is downloaded but headers. Raises FormatError for a header that is no good.
        """
        return None

    @abstractmethod
    def listing(self) -> list[str]:
        """Names of the files there, for messages; what is known of them if they cannot be listed. Never raises."""

    @abstractmethod
    def describe(self) -> str:
        """The place in words, for messages: ``directory '/x/y'`` or ``repository 'a/b' (commit 0123abcd)``."""

    def require(self, filename: str) -> Path:
        """Like ``find``, but raises NotFoundError (file, place, what is there instead) if there is none."""
        path = self.find(filename)
        if path is None:
            names = self.listing()
            raise NotFoundError(
                f"{self.describe()} has no file {filename!r}{nearest(filename, names)} ({what_is_there(names)})"
            )
        return path


@dataclass(frozen=True, eq=False)
class LocalSource(Source):
    """A directory of this machine. Symbolic links must stay inside it, except into a Hub cache's blobs."""

    directory: Path

    def find(self, filename: str) -> Path | None:
        path = self.directory / check_filename(filename)
        try:
            mode = os.lstat(path).st_mode
        except (OSError, ValueError):
            return None
        if "/" in filename or not stat.S_ISREG(mode):  # else it lies in the directory and nowhere else
            self._check_contained(path, filename)
            mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise PathError(f"{filename!r} in {self.describe()} is {kind}; a checkpoint holds regular files only")
        return path

    def fetch(self, filenames: Sequence[str]) -> list[Path]:
        found = [self.find(name) for name in filenames]
        missing = [name for name, path in zip(filenames, found, strict=True) if path is None]
        if missing:
            raise missing_weights(self, missing, "copy them there or save the checkpoint again")
        return [path for path in found if path is not None]

    def listing(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.directory))
        except OSError:
            return []

    def describe(self) -> str:
        return f"directory {str(self.directory)!r}"

    def _check_contained(self, path: Path, filename: str) -> None:
        root = self.directory.resolve()
        target = Path(os.path.realpath(path))  # realpath, unlike Path.resolve, takes link loops
        if not target.exists():
            raise PathError(
                f"{filename!r} in {self.describe()} is a symbolic link to {str(target)!r}, which is missing"
            )
        if target.is_relative_to(root) or _links_into_hub_blobs(root / filename, root):
            return
        raise PathError(
            f"{filename!r} in {self.describe()} is a symbolic link out of it, to {str(target)!r}; "
            "copy the file there, or pass the directory that really holds it"
        )


def resolve_source(
    name_or_path: str | os.PathLike[str] | Source,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    proxies: Mapping[str, str | None] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str = "",
    verify: str | bool | None = None,
) -> Source:
    """The Source of a directory path or a Hub repository id; a Source is returned as it is.

    A directory that exists is taken first. What can only be a path never reaches the network: NotFoundError if it is
    missing, PathError if it is a file. Otherwise the Hub is asked for the commit of ``revision`` (one request; none
    for a full commit hash, or with ``local_files_only``), and every file comes from that commit: NotFoundError,
    GatedError, OfflineError or HubError if that fails, RepoIdError if the name cannot be a repository id.
    proxies: {scheme: address}, for the Hub. verify: "sha256" compares every file with the hash that the Hub gave for
    it, downloaded now or cached: IntegrityError, and the file is removed, if it differs. It is an ArgumentError for a
    directory, for which nobody gave hashes.
    """
    if isinstance(name_or_path, Source):
        return name_or_path
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ArgumentError(
            f"a checkpoint is given as a path or a Hub repository id, not {type(name_or_path).__name__}"
        )
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise RepoIdError(f"{name!r} is neither a directory nor a Hub repository id such as 'org/name'")
    subfolder = _check_subfolder(subfolder)
    checked_proxies(proxies)  # also for a directory, where they have no effect
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        if wants_check(verify):
            raise ArgumentError(f"verify={verify!r} compares with the Hub's hashes, and {name!r} is a directory")
        return _local_source(name, path, subfolder)
    if os.path.lexists(path):
        raise _not_a_directory(name, path)
    if not isinstance(name_or_path, str) or _only_a_path(name):
        raise _missing_directory(name, path)
    return hub_source(
        name,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
        proxies=proxies,
        token=token,
        revision=revision,
        subfolder=subfolder,
        verify=verify,
    )


def hub_source(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    proxies: Mapping[str, str | None] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str = "",
    verify: str | bool | None = None,
) -> Source:
    """Like `resolve_source` for what must be a Hub repository, whatever directories are here."""
    check_repo_id(name)

    from .hub import HubOptions, open_repository

    options = HubOptions(
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        force_download=force_download,
        local_files_only=local_files_only,
        token=token,
        subfolder=subfolder,
        proxies=checked_proxies(proxies),
        verify=wants_check(verify),
    )
    return open_repository(name, revision, options)


def check_filename(filename: str) -> str:
    """The name itself if it is a relative path inside a checkpoint, in POSIX form; else PathError."""
    if not isinstance(filename, str):
        raise PathError(f"a file name in a checkpoint must be a string, not {type(filename).__name__}")
    parts = filename.split("/")
    if (
        not filename
        or any(part in ("", ".", "..") for part in parts)
        or "\\" in filename
        or ":" in filename  # drives, and streams beside a file
        or not filename.isprintable()
    ):
        raise PathError(
            f"{filename!r} is not a file name inside the checkpoint; absolute paths, '..', '\\', drives and control "
            "characters are refused"
        )
    return filename


def check_repo_id(name: str) -> None:
    """RepoIdError unless ``name`` is a well-formed Hub repository id, ``name`` or ``org/name``."""
    parts = name.split("/")
    good = len(parts) <= 2 and all(_REPO_PART.fullmatch(part) and len(part) <= 96 for part in parts)
    if good and ".." not in name and "--" not in name and not name.endswith(".git"):
        return
    raise RepoIdError(
        f"{name!r} is neither an existing directory nor a Hub repository id: that is 'name' or 'org/name', each "
        "at most 96 letters, digits, '-', '_' and '.', without '--' or '..', not starting or ending with '-' or '.', "
        "and not ending with '.git'"
    )


def what_is_there(names: Sequence[str]) -> str:
    """``it holds 'a', 'b'`` in words, shortened."""
    if not names:
        return "nothing is there"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "it holds " + ", ".join(repr(name) for name in names[:_SHOWN]) + more


def missing_weights(source: Source, missing: Sequence[str], advice: str) -> MissingWeightsError:
    """The error for weight files that ``source`` should have and has not."""
    shown = ", ".join(repr(name) for name in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return MissingWeightsError(f"{source.describe()} lacks {len(missing)} weight file(s): {shown}{more}; {advice}")


def _check_subfolder(subfolder: str) -> str:
    if not subfolder:
        return ""
    try:
        return check_filename(subfolder.strip("/") if not subfolder.startswith("/") else subfolder)
    except PathError as error:
        raise PathError(f"subfolder={subfolder!r} must be a relative path inside the checkpoint") from error


def _local_source(name: str, path: Path, subfolder: str) -> LocalSource:
    path = Path(os.path.abspath(path))
    directory = path / subfolder if subfolder else path
    if not os.path.isdir(directory):
        names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        raise NotFoundError(
            f"directory {str(path)!r} has no subfolder {subfolder!r}{nearest(subfolder, names)} "
            f"({what_is_there(names)})"
        )
    if not directory.resolve().is_relative_to(path.resolve()):
        raise PathError(f"subfolder={subfolder!r} is a symbolic link out of {str(path)!r}; pass its own path instead")
    return LocalSource(name, None, directory)


def _only_a_path(name: str) -> bool:
    """Whether no Hub repository could be meant."""
    looks = name.startswith((".", "~")) or os.path.isabs(name) or "\\" in name or bool(_DRIVE.match(name))
    return looks or name.endswith(("/", *_FILE_ENDINGS)) or name.count("/") > 1


def _not_a_directory(name: str, path: Path) -> Exception:
    if path.is_symlink() and not path.exists():
        return NotFoundError(f"{name!r} is a symbolic link to {os.readlink(path)!r}, which does not exist")
    more = f" and gguf_file={path.name!r}" if name.endswith(".gguf") else ""
    return PathError(f"{name!r} is a file; pass the directory that holds the checkpoint: {str(path.parent)!r}{more}")


def _missing_directory(name: str, path: Path) -> NotFoundError:
    if address := _ADDRESS.match(name):
        raise _no_place_to_read(name, address[1].lower())
    parent = path.parent
    hint = ""
    if os.path.isdir(parent):
        with suppress(OSError):
            hint = nearest(path.name, os.listdir(parent))
    else:
        hint = f"; its parent {str(parent)!r} does not exist either"
    return NotFoundError(f"no such directory: {name!r}{hint}")


def _no_place_to_read(name: str, scheme: str) -> NotFoundError:
    """For an address where a path or a repository id belongs."""
    if scheme in ("http", "https"):
        parts = name.split("://", 1)[1].split("/")
        hint = f"; to load from the Hub pass {'/'.join(parts[1:3])!r}" if len(parts) > 2 and all(parts[1:3]) else ""
        return NotFoundError(f"{name!r} is an address; a checkpoint is a directory or a Hub repository id{hint}")
    return NotFoundError(
        f"{name!r} is an address of {scheme}://, which is not read; mount it as a directory, or copy the files to one"
    )


def _links_into_hub_blobs(path: Path, root: Path) -> bool:
    """Whether ``path`` in a Hub snapshot links to the blobs of the same cached repository (or the cache's own)."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            target = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
            return target.parent == folder.parent.parent / "blobs"
    return False
