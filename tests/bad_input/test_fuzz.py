"""The coverage-guided fuzzer: a short run in the tests, with a fixed seed, and that it would find what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bad_input import fuzz
from bad_input.mutation import Mutator
from bad_input.targets import TARGETS

FUZZ = Path(fuzz.__file__)
RESULTS = FUZZ.parents[2] / "benchmarks" / "results" / "fuzz.json"


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(FUZZ.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--inputs", "80", "--seed", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["row"] for row in rows] == list(TARGETS)
    for row in rows:
        assert (row["faults"], row["lost"], row["run"]) == (0, 0, 0)
        assert row["inputs"] == row["accepted"] + row["refused"] >= 80
        assert row["accepted"] >= 1
        assert row["corpus"] > len(TARGETS[row["row"]].seeds())
        assert row["arcs"] > 80


@pytest.mark.parametrize("bug", ["raw error", "wrong weights", "file changed", "opened elsewhere"])
def test_it_finds_what_is_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Each kind of fault, planted where only some inputs reach it, is found and counted as what it is."""
    plain = TARGETS["header"]
    (tmp_path / "elsewhere").write_text("secret")

    def run(place: Path) -> bool:
        data = (place / plain.file).read_bytes()
        if b'"data_offsets"' in data and len(data) % 3 == 0:
            if bug == "raw error":
                raise KeyError("shape")
            if bug == "wrong weights":
                raise AssertionError("not what the file holds")
            if bug == "file changed":
                (place / plain.file).write_bytes(b"")
            else:
                (tmp_path / "elsewhere").read_text()
        return plain.run(place)

    monkeypatch.setitem(fuzz.TARGETS, "header", replace(plain, run=run))
    (row,) = fuzz.fuzz(0, 3, ["header"], tmp_path / "work", most=100)
    found = {"raw error": "faults", "wrong weights": "faults", "file changed": "lost", "opened elsewhere": "run"}[bug]
    assert row[found] > 0


def test_a_run_can_be_repeated() -> None:
    seed = TARGETS["config"].seeds()[0]
    inputs = [[mutator.text(seed, b"") for _ in range(50)] for mutator in (Mutator(7), Mutator(7), Mutator(8))]
    assert inputs[0] == inputs[1] != inputs[2]


def test_arcs_are_those_of_the_package() -> None:
    arcs = fuzz.Arcs()
    with arcs.traced():
        json.dumps({"a": [1]})
        from loadstone.errors import nearest

        nearest("lama", ["llama"])
        nearest("x" * 400, ["llama"])
    assert len(arcs.seen) >= 3
    assert {Path(code.co_filename).name for code, _, _ in arcs.seen} == {"errors.py"}
