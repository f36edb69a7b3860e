"""A save broken off at any step leaves the old checkpoint or the new one, never a mix."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loadstone.loading import atomic
from loadstone.loading.save import save_checkpoint

DRIVER = Path(__file__).with_name("crash_driver.py")
OLD = {
    "texts": {"config.json": "old config", "generation_config.json": "old"},
    "weights": {"a": [1.0] * 8, "b": [2.0] * 8, "c": [3.0] * 8},
}
NEW = {
    "texts": {"config.json": "new config", "generation_config.json": "new"},
    "weights": {"a": [4.0] * 8, "b": [5.0] * 8, "c": [6.0] * 8},
}
FOREIGN = ["tokenizer.json", "sub/log", "sub/deep/log"]
WHOLE = ["shards over shards", "shards over single", "single over shards", "single over single"]
FRESH = ["new directory", "no checkpoint yet"]
IN_PLACE = ["in place, more shards", "in place, to single", "in place, to shards"]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="directories are exchanged on Linux only")


def outcomes(tmp_path: Path, scenario: str, how: str) -> list[dict[str, Any]]:
    """What was found after a save was broken off at each of its steps; the last one ran to its end."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), scenario, how],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 20
    for outcome in found:  # whatever happened, the next save works and tidies up
        assert outcome["again"] == NEW, outcome
        assert outcome["left again"] == [], outcome
        assert not [name for name in outcome["files again"] if "saving" in name], outcome
    assert found[-1]["ended"] == "finished"
    assert found[-1]["found"] == NEW
    assert found[-1]["left"] == []
    return found


def check_ending(outcome: dict[str, Any]) -> None:
    assert outcome["ended"] in ("full", "finished", "finished all the same"), outcome
    if outcome["ended"] != "full":
        assert outcome["found"] == NEW, outcome


@pytest.mark.parametrize("scenario", WHOLE)
def test_killed_at_every_step(tmp_path: Path, scenario: str) -> None:
    found = outcomes(tmp_path, scenario, "kill")
    for outcome in found:
        assert outcome["found"] in (OLD, NEW), outcome
        assert outcome["foreign"] == FOREIGN, outcome
    assert [outcome["found"] == NEW for outcome in found] == sorted(outcome["found"] == NEW for outcome in found)
    assert {outcome["ended"] for outcome in found[:-1]} == {"killed"}
    assert found[0]["found"] == OLD


@pytest.mark.parametrize("scenario", WHOLE[:3])
def test_disk_full_at_every_step(tmp_path: Path, scenario: str) -> None:
    for outcome in outcomes(tmp_path, scenario, "full"):
        check_ending(outcome)
        assert outcome["found"] == (OLD if outcome["ended"] == "full" else NEW), outcome
        assert outcome["foreign"] == FOREIGN, outcome


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("scenario", FRESH)
def test_first_save_is_there_wholly_or_not_at_all(tmp_path: Path, scenario: str, how: str) -> None:
    for outcome in outcomes(tmp_path, scenario, how):
        assert outcome["found"] in (None, NEW), outcome
        if how == "full":
            check_ending(outcome)
        assert outcome["foreign"] == (FOREIGN if scenario == "no checkpoint yet" else []), outcome


@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("scenario", IN_PLACE)
def test_in_place_the_weights_are_of_one_save(tmp_path: Path, scenario: str, how: str) -> None:
    for outcome in outcomes(tmp_path, scenario, how):
        assert outcome["found"]["weights"] in (OLD["weights"], NEW["weights"]), outcome
        assert outcome["foreign"] == FOREIGN, outcome


@pytest.mark.parametrize("limit", [0, 1, 64, 1000, 4096, 70_000])
def test_file_size_limit(tmp_path: Path, limit: int) -> None:
    """The system refuses to let a file grow, as a full disk or a quota does."""
    old, new = {"a": torch.zeros(20_000)}, {"a": torch.ones(20_000)}
    save_checkpoint(tmp_path / "m", old, texts={"config.json": "{}"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="nothing was saved") as caught:
            save_checkpoint(tmp_path / "m", new, texts={"config.json": "{}"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno
    assert os.listdir(tmp_path) == ["m"]
    assert load_file(tmp_path / "m" / "model.safetensors")["a"].sum() == 0


def test_running_saves_are_not_taken_for_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "m"
    running, descriptor = atomic._locked_directory(tmp_path, ".m.saving-")
    dead = tmp_path / f".m.saving-{'0' * 32}"
    others = [tmp_path / f".n.saving-{'0' * 32}", tmp_path / ".m.saving-mine"]
    for directory in (dead, *others):
        directory.mkdir()
        (directory / "x").write_text("x")
    atomic.clear_leftovers(target)
    assert not dead.exists()
    assert running.exists()
    assert all((other / "x").exists() for other in others)
    assert descriptor is not None
    os.close(descriptor)
    atomic.clear_leftovers(target)
    assert not running.exists()


def test_saves_of_several_threads_to_one_directory(tmp_path: Path) -> None:
    states = [{name: torch.full((10,), float(number)) for name in "abc"} for number in range(4)]
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for limit in (40, 1000, 80):
                save_checkpoint(
                    tmp_path / "m", states[number], texts={"config.json": str(number)}, max_shard_size=limit
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["m"]
    names = sorted(name for name in os.listdir(tmp_path / "m") if name.endswith(".safetensors"))
    number = float((tmp_path / "m" / "config.json").read_text())
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        assert all(tensor.eq(number).all() for tensor in load_file(tmp_path / "m" / name).values())
