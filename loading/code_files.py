"""A repository's Python files: what a module needs through its relative imports, read once and held as bytes.

Notable: nothing here runs code. Files are found by parsing, so what is held is complete before the first line runs, and
later changes on the disk, or in the repository, do not mix with it.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..errors import RemoteCodeError
from .source import LocalSource, Source

_LARGEST = 8 << 20
_MOST = 1000
Finder = Callable[[str], Path | None]


@dataclass(frozen=True)
class CodeFile:
    """One file: where it lies, for tracebacks, and what it held when it was read."""

    path: Path
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class CodeFiles:
    """Files of one repository at one commit (None: a directory), by their names in it (``sub/layers.py``).

    ``repository``: its id, or the directory's real path. ``place``: it in words.
    """

    repository: str
    commit: str | None
    place: str
    files: dict[str, CodeFile] = field(repr=False)

    @property
    def digest(self) -> str:
        """Tells apart repositories, commits and contents; 64 hexadecimal digits."""
        summed = hashlib.sha256(f"{self.repository}\0{self.commit}\0".encode("utf-8", "surrogateescape"))
        for name, file in sorted(self.files.items()):
            summed.update(f"{name}\0{len(file.content)}\0".encode())
            summed.update(file.content)
        return summed.hexdigest()


def root_of(source: Source) -> Source:
    """The whole repository or directory of a source that may be one of its subfolders: code lies at its top."""
    if isinstance(source, LocalSource):
        top = Path(os.path.abspath(os.path.expanduser(source.name)))
        return source if top == source.directory or not top.is_dir() else LocalSource(source.name, None, top)
    options = getattr(source, "options", None)
    if options is None or not options.subfolder:
        return source
    return dataclasses.replace(source, options=dataclasses.replace(options, subfolder=""))  # type: ignore[call-arg]


def collect(source: Source, entries: Iterable[str]) -> CodeFiles:
    """The files ``entries`` of a source and all that they reach by relative imports.

    Raises NotFoundError if an entry is missing, PathError for one that leaves the source, RemoteCodeError for too large
    or too many files. An import whose file is missing is left to fail when it runs: it may be optional.
    """
    entries = list(entries)
    for entry in entries:
        source.require(entry)
    repository = os.path.realpath(source.directory) if isinstance(source, LocalSource) else source.name
    return CodeFiles(repository, source.commit, source.describe(), read_reached(source.find, entries))


def read_reached(find: Finder, entries: Iterable[str]) -> dict[str, CodeFile]:
    """``entries``, which are there, and the files that they import relatively, by name; ``find`` gives their paths."""
    found: dict[str, CodeFile] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = find(name)
        if path is None:
            continue
        found[name] = CodeFile(path, _read(name, path))
        if len(found) > _MOST:
            raise RemoteCodeError(
                f"{name!r} and what it imports relatively are more than {_MOST} files: no model's code"
            )
        waiting += _imported(name, found[name].content, find)
    return found


def _read(name: str, path: Path) -> bytes:
    with open(path, "rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise RemoteCodeError(f"{name!r} ({path}) has more than {_LARGEST} bytes: no model's code")
    return content


def _imported(name: str, content: bytes, find: Finder) -> Iterator[str]:
    """Names of the files that the relative imports of a file may mean; some may be missing."""
    folder = PurePosixPath(name).parent.parts
    for node in ast.walk(_parsed(content)):
        if not isinstance(node, ast.ImportFrom) or not node.level or node.level - 1 > len(folder):
            continue
        base = folder[: len(folder) - (node.level - 1)]
        wanted = [alias.name for alias in node.names if alias.name != "*"]
        if node.module is None:
            yield from _members(base, wanted, find)
            continue
        parts = node.module.split(".")
        for end in range(1, len(parts)):  # packages on the way run too
            yield _file(base, *parts[:end], "__init__")
        module = _file(base, *parts)
        if find(module) is not None:
            yield module
            continue
        package = _file(base, *parts, "__init__")
        path = find(package)
        bound = _bound(_read(package, path)) if path is not None else set()
        yield package
        yield from _members((*base, *parts), [one for one in wanted if one not in bound], find)


def _members(base: tuple[str, ...], names: Iterable[str], find: Finder) -> Iterator[str]:
    """Files of ``from . import name``: a module, a package, else something that the package itself defines."""
    for name in names:
        module = _file(base, name)
        if find(module) is not None:
            yield module
        elif find(package := _file(base, name, "__init__")) is not None:
            yield package
        elif base:
            yield _file(base, "__init__")


def _file(base: tuple[str, ...], *parts: str) -> str:
    return "/".join((*base, *parts)) + ".py"


def _parsed(content: bytes) -> ast.Module:
    """The syntax tree; an empty one for what cannot be parsed, which will be told when it is to run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are raised again when the code is compiled
            return ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _bound(content: bytes) -> set[str]:
    """Names that a module gives a value anywhere."""
    bound: set[str] = set()
    for node in ast.walk(_parsed(content)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return bound
