"""kill -9, and a disk that fills, at every step of what writes checkpoints besides `save_pretrained`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")
FOREIGN = ["tokenizer.json", "sub/log", "sub/deep/log"]
SCENARIOS = ["quantize over shards", "quantize to shards", "adapter over adapter"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="directories are exchanged on Linux only"),
]


def outcomes(tmp_path: Path, scenario: str, how: str) -> list[dict[str, Any]]:
    """What was found after a write was broken off at each of its steps; the last one ran to its end."""
    path = os.pathsep.join(filter(None, (str(DRIVER.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path / "work"), scenario, how],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 15
    new = found[-1]["found"]
    assert found[-1]["ended"] == "finished"
    assert found[-1]["left"] == []
    for outcome in found:  # whatever happened, the next one works and tidies up
        assert outcome["again"] == new, outcome
        assert outcome["left again"] == [], outcome
        assert not [name for name in outcome["files again"] if "saving" in name], outcome
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_step(tmp_path: Path, scenario: str) -> None:
    found = outcomes(tmp_path, scenario, "kill")
    old, new = found[0]["found"], found[-1]["found"]
    assert old != new
    for outcome in found:
        assert outcome["found"] in (old, new), outcome
        assert outcome["foreign"] == FOREIGN, outcome
    is_new = [outcome["found"] == new for outcome in found]
    assert is_new == sorted(is_new)
    assert {outcome["ended"] for outcome in found[:-1]} == {"killed"}


@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_first_one_is_there_wholly_or_not_at_all(tmp_path: Path, how: str) -> None:
    found = outcomes(tmp_path, "quantize anew", how)
    for outcome in found:
        assert outcome["found"] in (None, found[-1]["found"]), outcome
    assert None in [outcome["found"] for outcome in found]


@pytest.mark.parametrize("scenario", ["quantize over single", "adapter over adapter"])
def test_a_disk_that_fills_at_every_step(tmp_path: Path, scenario: str) -> None:
    found = outcomes(tmp_path, scenario, "full")
    old, new = next(one["found"] for one in found if one["ended"] == "full"), found[-1]["found"]
    assert old != new
    for outcome in found:
        assert outcome["ended"] in ("full", "finished", "finished all the same"), outcome
        assert outcome["found"] == (old if outcome["ended"] == "full" else new), outcome
        assert outcome["foreign"] == FOREIGN, outcome
