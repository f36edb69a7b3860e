"""What the compiler makes of every kernel for the GPUs there are tables for, none of which needs to be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the package triton")

HARNESS = Path(__file__).with_name("ahead_of_time.py")
# Bytes of shared memory that one program can have: CUDA programming guide, table of compute capabilities; MI300X ISA.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


@lru_cache(maxsize=4)
def compiled(target: str) -> list[dict[str, Any]]:
    """An entry for each kernel, from a process in which the interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HARNESS, target], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def described(entry: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in entry.items() if name != "types"})


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_no_register_is_spilled(target: str) -> None:
    entries = compiled(target)
    assert entries
    assert not [described(entry) for entry in entries if entry["spills"] > entry["tolerated"]]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_shared_memory_is_within_the_chip(target: str) -> None:
    assert not [described(entry) for entry in compiled(target) if entry["shared"] > SHARED_MEMORY[target]]


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_matrix_instructions_where_a_family_says_so(target: str) -> None:
    assert not [described(entry) for entry in compiled(target) if entry["wanted"] and not entry["matrix"]]
