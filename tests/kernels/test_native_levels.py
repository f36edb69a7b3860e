"""Which level of processor the compiled code is for: found, and chosen by the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from native_code import at_each_level, compiled

from loadstone.errors import KernelError
from loadstone.kernels import native

pytestmark = compiled


@pytest.fixture
def asked(monkeypatch):
    """`native.level` as it answers with the environment's variable set to this."""

    def level(value: str) -> str:
        monkeypatch.setenv(native.VARIABLE, value)
        native.level.cache_clear()
        try:
            return native.level()
        finally:
            native.level.cache_clear()

    return level


def test_the_highest_by_default(asked):
    assert asked("") == native.levels()[-1]
    assert native.levels() == native.LEVELS[: len(native.levels())]


@at_each_level
def test_each_can_be_chosen(asked, level):
    assert asked(level) == level


def test_refuses_levels_there_are_not(asked, monkeypatch):
    with pytest.raises(KernelError, match=r"LOADSTONE_NATIVE is 'avx9'; this processor has avx2"):
        asked("avx9")
    monkeypatch.setattr(native, "levels", lambda: ("avx2",))
    with pytest.raises(KernelError, match=r"'avx512'; this processor has avx2$"):
        asked("avx512")


def test_a_library_of_another_version_is_not_called(monkeypatch):
    monkeypatch.setattr(native, "_VERSION", -1)
    library, reason = native._find.__wrapped__()
    assert library is None
    assert "compiled from the source of another version" in reason


def test_the_environment_is_heard_by_a_process():
    code = "from loadstone.kernels import native; print(native.level())"
    environment = {**os.environ, native.VARIABLE: native.LEVELS[0]}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == [native.LEVELS[0]], found.stderr
