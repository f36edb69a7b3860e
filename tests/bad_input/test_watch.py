"""The watch that other tests rely on sees what it is there to see."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input.inputs import MARK, good, put, watched


def _connect() -> None:
    with socket.socket() as probe:
        probe.settimeout(0.1)
        probe.connect_ex(("127.0.0.1", 9))


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.getenv, ("HOME",)


@pytest.mark.parametrize(
    "act",
    [
        lambda place: (place.parent / "outside.txt").read_text(),
        lambda place: (place / "new").write_text("x"),
        lambda place: (place / "config.json").unlink(),
        lambda place: os.system("true"),
        lambda place: subprocess.run([sys.executable, "-c", ""]),
        lambda place: _connect(),
        lambda place: eval(f"'{MARK}'"),
        lambda place: pickle.loads(pickle.dumps(Evil())),
    ],
    ids=["read outside", "write", "remove", "shell", "program", "connect", "compile", "pickle"],
)
def test_the_watch_sees(tmp_path: Path, act: Callable[[Path], object]) -> None:
    place = put(tmp_path / "checkpoint", good())
    (tmp_path / "outside.txt").write_text("secret")
    with watched(place) as seen:
        (place / "config.json").read_bytes()
    assert seen == []
    with watched(place) as seen:
        act(place)
    assert seen
