"""docs/bad_input.md and the tests agree both ways: every row has its test, every test here has its row."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import pytest
from bad_input import table

from loadstone import errors

HERE = Path(__file__).parent
BUILT_IN = {"ValueError", "IndexError"}  # of functions of tensors, which raise what torch's do
UNLISTED = {"test_watch.py", "test_table.py"}
HARMLESS = {"none", "a warning"}


@lru_cache(maxsize=1)
def text() -> str:
    return table.DOCUMENT.read_text(encoding="utf-8")


def rows() -> Iterator[tuple[list[str], list[str]]]:
    """(cells, what the nearest "Tests:" paragraph before it names) of each row of each table of inputs."""
    places: list[str] = []
    inputs = False
    for block in re.split(r"\n{2,}", text()):
        if block.startswith("Tests:"):
            places = re.findall(r"`(tests/[\w./]+(?:::\w+)?)`", block)
        for line in block.splitlines():
            if line.startswith("| input "):
                inputs = True
            elif not line.startswith("|"):
                inputs = False
            elif inputs and not line.startswith("|---"):
                yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]], places


@cache
def functions(file: str) -> frozenset[str]:
    """The tests of one file, or of all files of a folder."""
    path = table.ROOT / file
    files = [path] if path.suffix else sorted(path.rglob("test_*.py"))
    found = (node for one in files for node in ast.walk(ast.parse(one.read_text(encoding="utf-8"))))
    return frozenset(node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def named(cells: list[str], places: list[str]) -> list[tuple[str, str]]:
    """(file, test or [id]) for each test that a row names."""
    found = []
    for name in re.findall(r"`([^`]+)`", cells[4]):
        if name.startswith("["):
            found.append((places[0], name))
        elif "::" in name:
            file, _, test = name.partition("::")
            found.append((file, test))
        else:
            files = [place.partition("::")[0] for place in places]
            file = next((file for file in files if name in functions(file)), "no file of " + ", ".join(files))
            found.append((file, name))
    return found


def test_there_are_enough_rows_and_each_is_whole() -> None:
    count = 0
    for cells, _ in rows():
        assert len(cells) == 5, cells
        assert all(cells), cells
        assert set(cells[3].split()) <= set("BRFMOWC"), cells
        count += 1
    assert count >= 80
    letters = set(re.findall(r"^- \*\*([A-Z])\*\*", text(), re.MULTILINE))
    assert letters == set("BRFMOWC")


def test_every_error_exists() -> None:
    ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    for cells, _ in rows():
        kinds = set(re.findall(r"\w+", cells[1])) if cells[1] not in HARMLESS else set()
        assert kinds or cells[1] in HARMLESS, cells
        assert kinds <= ours | BUILT_IN, cells


def test_every_row_names_tests_that_exist() -> None:
    for cells, places in rows():
        tests = named(cells, places)
        assert tests, cells
        for file, test in tests:
            if test.startswith("["):
                path, _, function = file.partition("::")
                ids = {table._plain(row[3]) for row in table.rows_of(path, function)}
                assert test[1:-1] in ids, (test, file)
            else:
                assert (table.ROOT / file).exists(), cells
                assert test in functions(file), (test, file)


def test_every_test_here_has_its_row() -> None:
    there = {pair for cells, places in rows() for pair in named(cells, places)}
    for path in sorted(HERE.glob("test_*.py")):
        if path.name in UNLISTED:
            continue
        file = f"tests/bad_input/{path.name}"
        for test in sorted(functions(file)):
            ids = {(f"{file}::{test}", f"[{table._plain(row[3])}]") for row in _cases(file, test)}
            assert (file, test) in there or (ids and ids <= there), f"{file}::{test} has no row"


def _cases(file: str, test: str) -> list[tuple[str, str, str, str]]:
    if f"<!-- rows of {file}::{test}," not in text():
        return []
    importlib.import_module(f"bad_input.{Path(file).stem}")
    return list(table.rows_of(file, test))


def test_the_tables_are_those_of_the_tests() -> None:
    assert table.renewed(text()) == text(), "run python tests/bad_input/table.py"


@pytest.mark.skipif(not table.RESULTS.exists(), reason="no run is recorded")
def test_the_recorded_run_found_nothing() -> None:
    import json

    from bad_input.targets import TARGETS

    result = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    assert {row["row"] for row in result["rows"]} <= set(TARGETS)
    assert sum(row["inputs"] for row in result["rows"]) == result["total"]["inputs"] > 10_000
    assert (result["total"]["faults"], result["total"]["lost"], result["total"]["run"]) == (0, 0, 0)


@pytest.mark.skipif(not table.FAULTS.exists(), reason="no count is recorded")
def test_the_recorded_faults_lost_nothing() -> None:
    import json

    result = json.loads(table.FAULTS.read_text(encoding="utf-8"))
    assert sum(row["injected"] for row in result["rows"]) == result["total"]["injected"] > 500
    assert result["total"]["lost"] == 0
