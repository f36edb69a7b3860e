"""Runs tests/simulated, where torch has accelerators that are not there, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SIMULATED = Path(__file__).parents[1] / "simulated"


@pytest.mark.skipif(
    not hasattr(torch._C, "_acc"), reason="this torch cannot have a backend written in Python; maps need a GPU there"
)
@pytest.mark.parametrize("file", sorted(SIMULATED.glob("sim_*.py")), ids=lambda path: path.stem)
def test_on_simulated_devices(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--disable-warnings", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SIMULATED.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
