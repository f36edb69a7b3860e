"""What the tests of bad input share: a good small checkpoint to spoil, rows of a table, a watch on the process."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save

MARK = "payload_of_a_stranger"  # part of every hostile string: code that holds it must never be compiled
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_ROOTS = tuple({os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])})
_SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/", "/usr/", "/lib")
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil.rmtree",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of docs/bad_input.md: how to spoil a good checkpoint, and the error that names what is wrong with it."""

    spoil: Callable[[Path], object]
    error: type[Exception]
    words: tuple[str, ...]


def case(spoil: Callable[[Path], object], error: type[Exception], *words: str) -> Case:
    return Case(spoil, error, words)


def table(cases: dict[str, Case]) -> Any:
    """The decorator of a test that runs for every case."""
    return pytest.mark.parametrize("row", [pytest.param(value, id=name) for name, value in cases.items()])


@lru_cache(maxsize=1)
def good() -> dict[str, bytes]:
    """The files of a whole small Llama."""
    with tempfile.TemporaryDirectory() as place:
        tiny.checkpoint(Path(place), "llama")
        found = {name: (Path(place) / name).read_bytes() for name in ("config.json", "model.safetensors")}
    return {**found, "generation_config.json": b'{"max_new_tokens": 4, "eos_token_id": 2}'}


@lru_cache(maxsize=1)
def good_sharded() -> dict[str, bytes]:
    """The same in two shards."""
    files = dict(good())
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.safetensors"
        path.write_bytes(files.pop("model.safetensors"))
        tensors = load_file(path)
    names = sorted(tensors)
    parts = {SHARDS[0]: names[::2], SHARDS[1]: names[1::2]}
    for shard, held in parts.items():
        files[shard] = save({name: tensors[name] for name in held}, {"format": "pt"})
    weight_map = {name: shard for shard, held in parts.items() for name in held}
    total = sum(tensor.nbytes for tensor in tensors.values())
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": weight_map}
    ).encode()
    return files


def put(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def config(**changes: Any) -> Callable[[Path], object]:
    """Spoil config.json: fields set, or with the value ``...`` taken out."""

    def spoil(directory: Path) -> None:
        values = {**tiny.values("llama"), **changes}
        kept = {name: value for name, value in values.items() if value is not ...}
        (directory / "config.json").write_text(json.dumps(kept))

    return spoil


def write(name: str, data: bytes | str | Any) -> Callable[[Path], object]:
    """Spoil one file: bytes as they are, anything else as JSON."""
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    return lambda directory: (directory / name).write_bytes(content)


def snapshot(directory: Path) -> dict[str, tuple[int, str]]:
    """Mode and content of everything below a directory; links are not followed."""
    found = {}
    for path in sorted(directory.rglob("*")):
        info = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(info.st_mode) else ""
        found[str(path.relative_to(directory))] = (info.st_mode, content)
    return found


def refused(directory: Path, row: Case, *doors: Callable[[Path], object]) -> None:
    """Every door raises the row's error, which says its words; nothing is changed, run, or opened elsewhere."""
    row.spoil(directory)
    before = snapshot(directory)
    for door in doors:
        with watched(directory) as seen, pytest.raises(row.error) as caught:
            door(directory)
        assert type(caught.value) is row.error, caught.value
        for words in row.words:
            assert words in str(caught.value), caught.value
        assert len(str(caught.value)) < 20_000
        assert seen == []
    assert snapshot(directory) == before


_watching: list[tuple[str, list[str]]] = []


@contextmanager
def watched(directory: Path) -> Iterator[list[str]]:
    """What this process does meanwhile that reading a checkpoint must not: starting programs, connecting, changing
    files, opening files outside the directory (Python's own and the system's excepted), compiling a stranger's text."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    seen: list[str] = []
    _watching.append((os.path.realpath(directory), seen))
    try:
        yield seen
    finally:
        _watching.pop()


_installed: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    directory, seen = _watching[-1]
    if event == "open":
        path, _mode, flags = arguments
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.path.realpath(os.fsdecode(path))
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            known = place.startswith((directory + os.sep, *_SYSTEM, *(root + os.sep for root in _ROOTS)))
            if not known or (writes and not place.startswith(("/dev/null", *_ROOTS))):
                seen.append(f"open {place}")
    elif event in _FORBIDDEN:
        seen.append(f"{event} {arguments!r}")
    elif event == "compile" and MARK in repr(arguments):
        seen.append(f"compile {arguments!r}")
    elif event == "exec" and arguments and getattr(arguments[0], "co_filename", "").startswith(directory):
        seen.append(f"exec {arguments!r}")
