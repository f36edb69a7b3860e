"""The documents name tests, files and commands that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_every_row_of_bad_input_has_its_test() -> None:
    rows = (ROOT / "docs" / "bad_input.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", rows))
    there = {name for file in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(named) > 40
    assert named <= there


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for folder in ("tests", "examples", "docs", "benchmarks", "models", "loading", "kernels", "cli"):
        for path in re.findall(rf"(?<![\w/]){folder}/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_commands_in_the_readme_parse() -> None:
    from loadstone.cli.main import parser

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("loadstone ")]
    assert len(lines) >= 4
    for line in lines:
        words = re.sub(r'"[^"]*"', "TEXT", line.split("#")[0]).split()[1:]
        parser().parse_args(words)


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"^make (\w+)", document.read_text(encoding="utf-8"), re.MULTILINE):
            assert target in targets


def test_figures_in_the_readme_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.table", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"run python -m benchmarks.table {done.stderr}"
