"""Indexes that lead out of the checkpoint, contradict its shards, or are no indexes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input.inputs import SHARDS, Case, case, good, good_sharded, put, refused, table, write

from loadstone import AutoModelForCausalLM
from loadstone.errors import FormatError, IntegrityError, MissingWeightsError, PathError, UnsafeFormatError
from loadstone.loading.index import MAX_INDEX, MAX_SHARDS

FILE = "model.safetensors.index.json"
Spoil = Callable[[Path], object]


def weight_map() -> dict[str, str]:
    return json.loads(good_sharded()[FILE])["weight_map"]


def index(**changes: Any) -> Spoil:
    """Fields of the index set, or with ``...`` taken out."""
    values = {**json.loads(good_sharded()[FILE]), **changes}
    return write(FILE, {name: value for name, value in values.items() if value is not ...})


def shard_called(name: Any) -> Spoil:
    """The index names another file for the tensors of the first shard; the file is where that leads."""

    def spoil(directory: Path) -> None:
        index(weight_map={key: name if shard == SHARDS[0] else shard for key, shard in weight_map().items()})(directory)
        for place in (directory.parent / "model.safetensors", directory.parent / "other" / "model.safetensors"):
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(good_sharded()[SHARDS[0]])

    return spoil


def also(name: str, shard: str) -> Spoil:
    return index(weight_map={**weight_map(), name: shard})


def without(*names: str) -> Spoil:
    return lambda directory: [(directory / name).unlink() for name in names]


def huge(directory: Path) -> None:
    with open(directory / FILE, "r+b") as file:
        file.truncate(MAX_INDEX + 1)


def both(*spoils: Spoil) -> Spoil:
    return lambda directory: [spoil(directory) for spoil in spoils]


def out(name: Any) -> Case:
    return case(shard_called(name), PathError, FILE, "not inside the checkpoint")


ONE = next(iter(weight_map()))
CASES = {
    "empty": case(write(FILE, b""), FormatError, FILE, "not valid JSON"),
    "cut off": case(write(FILE, good_sharded()[FILE][:-20]), FormatError, FILE, "not valid JSON"),
    "not UTF-8": case(write(FILE, b'{"\xff": 1}'), FormatError, FILE),
    "NaN": case(write(FILE, b'{"metadata": {"total_size": NaN}, "weight_map": {}}'), FormatError, FILE, "NaN"),
    "a list": case(write(FILE, b"[]"), FormatError, FILE, "must be a JSON object, not an array"),
    "null": case(write(FILE, b"null"), FormatError, FILE, "must be a JSON object"),
    "nested deep": case(write(FILE, b'{"weight_map":' * 100_000), FormatError, FILE, "nested too deep"),
    "no weight_map": case(index(weight_map=...), FormatError, "'weight_map' is missing"),
    "an empty weight_map": case(index(weight_map={}), FormatError, "'weight_map' is empty"),
    "a weight_map that is a list": case(index(weight_map=[SHARDS[0]]), FormatError, "'weight_map' is an array"),
    "a shard that is a number": case(shard_called(3), FormatError, "must be a file name, not a number"),
    "a shard that is a list": case(shard_called([SHARDS[0]]), FormatError, "must be a file name, not an array"),
    "a tensor twice": case(
        write(FILE, b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'), FormatError, "'a' is there twice"
    ),
    "over the limit of bytes": case(huge, FormatError, FILE, f"at most {MAX_INDEX}"),
    "twenty thousand shards": case(
        index(weight_map={f"t{n}": f"{n}.safetensors" for n in range(20_000)}),
        FormatError,
        f"{MAX_SHARDS} are the most",
    ),
    "a shard above the directory": out("../other/model.safetensors"),
    "a shard above it, in disguise": out("sub/../../model.safetensors"),
    "an absolute shard": out("/etc/model.safetensors"),
    "a shard in a home directory's drive": out("C:\\model.safetensors"),
    "a shard on a drive, with slashes": out("c:/model.safetensors"),
    "a shard on a share": out("\\\\server\\share\\model.safetensors"),
    "a shard with backslashes": out("..\\model.safetensors"),
    "a stream beside a shard": out("model.safetensors:hidden.safetensors"),
    "a shard without a name": out(""),
    "a shard named as the directory": out("."),
    "a shard with NUL": out("a\0.safetensors"),
    "a shard with an escape sequence": out("\x1b[2J.safetensors"),
    "a shard with half a surrogate pair": case(
        write(FILE, rb'{"weight_map": {"a": "\ud800.safetensors"}}'), FormatError, FILE, "not valid JSON"
    ),
    "a shard that is a pickle": case(shard_called("pytorch_model.bin"), UnsafeFormatError, "pytorch_model.bin"),
    "a missing shard": case(without(SHARDS[1]), MissingWeightsError, SHARDS[1], "lacks 1 weight file"),
    "all shards missing": case(without(*SHARDS), MissingWeightsError, *SHARDS),
    "shards without an index": case(without(FILE), MissingWeightsError, "fetch the index file again"),
    "a tensor in another shard than it says": case(
        index(weight_map={**weight_map(), ONE: SHARDS[weight_map()[ONE] == SHARDS[0]]}), IntegrityError, ONE, "not in"
    ),
    "a tensor that no shard has": case(also("ghost", SHARDS[0]), IntegrityError, "'ghost' is not in"),
    "one tensor in two shards": case(
        both(also("ghost", "more.safetensors"), write("more.safetensors", good_sharded()[SHARDS[0]])),
        IntegrityError,
        "is both in",
        "more.safetensors",
    ),
    "a shard that is cut off": case(
        write(SHARDS[1], good_sharded()[SHARDS[1]][:-7]), FormatError, SHARDS[1], "truncated"
    ),
    "a shard that is a web page": case(write(SHARDS[0], b"<html></html>"), FormatError, SHARDS[0], "web page"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return put(tmp_path / "checkpoint", good_sharded())


@table(CASES)
def test_refused(directory: Path, row: Case) -> None:
    refused(directory, row, AutoModelForCausalLM.from_pretrained)


TOLERATED: dict[str, tuple[Spoil, str]] = {
    "no metadata": (index(metadata=...), ""),
    "metadata that is a list": (index(metadata=[1]), ""),
    "a total that is wrong": (index(metadata={"total_size": 3}), "says total_size 3"),
    "a total beyond all bounds": (index(metadata={"total_size": 1e308}), "says total_size 1000"),
    "a total that is a text": (index(metadata={"total_size": "all"}), ""),
    "unknown fields": (index(more={"trust_remote_code": True}), ""),
    "a tensor that is not listed": (
        index(weight_map={name: shard for name, shard in weight_map().items() if name != ONE}),
        "1 tensors of the shards are not in",
    ),
    "a shard that is not listed": (write("model-00003-of-00003.safetensors", b"<html>"), ""),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_tolerated(directory: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """What does no harm is a warning at most, and the weights are the right ones."""
    spoil, warning = TOLERATED[name]
    spoil(directory)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(directory)
    assert warning in caplog.text
    whole = AutoModelForCausalLM.from_pretrained(put(directory.parent / "whole", good()))
    expected = whole.state_dict()
    assert all(tensor.equal(expected[key]) for key, tensor in model.state_dict().items())
