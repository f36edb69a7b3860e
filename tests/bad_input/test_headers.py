"""Headers of safetensors files that lie, contradict themselves or are not headers at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input.inputs import MARK, Case, case, good, put, refused, table, write

from loadstone import AutoModelForCausalLM, LlamaForCausalLM
from loadstone.errors import FormatError
from loadstone.loading.header import MAX_HEADER, MAX_NAME, read_header
from loadstone.models.preview import preview

FILE = "model.safetensors"
Spoil = Callable[[Path], object]


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> Spoil:
    """A file with this header, whatever it is, and a length that may lie."""
    return write(FILE, (len(header) if length is None else length).to_bytes(8, "little") + header + data)


def tensors(entries: Any, data: bytes = b"") -> Spoil:
    return raw(json.dumps(entries).encode(), data)


def one(data: bytes = b"", name: str = "a", **fields: Any) -> Spoil:
    """One tensor, by default two float32; a field of ``...`` is left out."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}
    return tensors({name: {key: value for key, value in entry.items() if value is not ...}}, data or bytes(8))


def two(first: tuple[int, int], second: tuple[int, int], size: int = 16) -> Spoil:
    places = {"a": first, "b": second}
    entries = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in places.items()
    }
    return tensors(entries, bytes(size))


def bad(spoil: Spoil, *words: str) -> Case:
    return case(spoil, FormatError, FILE, *words)


CASES = {
    "empty": bad(write(FILE, b""), "empty", "fetch it again"),
    "seven bytes": bad(write(FILE, b"\x02\0\0\0\0\0\0"), "too short"),
    "eight zero bytes": bad(write(FILE, bytes(8)), "zeros"),
    "length zero": bad(raw(b'{"a": 1}', length=0), "header length 0"),
    "length beyond the file": bad(raw(b"{}", length=5000), "truncated", "5000 bytes"),
    "length over the limit": bad(raw(b"{}", length=MAX_HEADER + 1), f"limit of {MAX_HEADER}"),
    "length of 2^63": bad(raw(b"{}", length=1 << 63), "over the limit"),
    "length of 2^64-1": bad(raw(b"{}", length=(1 << 64) - 1), "over the limit"),
    "not JSON": bad(raw(b"{nope}  "), "not valid JSON"),
    "a list": bad(raw(b'["a"]   '), "does not start with '{'"),
    "spaces before the object": bad(raw(b"  {}"), "does not start with '{'"),
    "not UTF-8": bad(raw(b'{"\xff": 1}'), "not UTF-8"),
    "a byte order mark": bad(raw("\ufeff{}".encode()), "does not start with '{'"),
    "NaN": bad(raw(b'{"a": NaN}'), "NaN is not JSON"),
    "a number of five thousand digits": bad(raw(b'{"a": ' + b"9" * 5000 + b"}"), "JSON"),
    "nested a hundred thousand deep": bad(raw(b'{"a":' * 100_000), "nested too deep"),
    "two megabytes of brackets": bad(raw(b'{"a":' + b"[[],[]]," * (1 << 18) + b"1}"), "little but brackets"),
    "a tensor twice": bad(raw(json.dumps({"a": 1}).encode()[:-1] + b', "a": 2}'), "'a' is there twice"),
    "a field twice": bad(
        raw(b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}', bytes(4)), "is there twice"
    ),
    "a name twice after fifty thousand others": bad(
        raw(("{" + "".join(f'"{n}":1,' for n in range(50_000)) + '"x":1,"x":1}').encode()), "'x' is there twice"
    ),
    "metadata that is a list": bad(tensors({"__metadata__": ["pt"]}), "__metadata__ must be an object of strings"),
    "metadata with a number": bad(tensors({"__metadata__": {"format": 1}}), "__metadata__ must be"),
    "a tensor that is a number": bad(tensors({"a": 3}), "tensor 'a' needs exactly dtype, shape and data_offsets"),
    "no dtype": bad(one(dtype=..., more=1), "tensor 'a' has no dtype"),
    "no shape": bad(one(shape=..., more=1), "tensor 'a' has no shape"),
    "no offsets": bad(one(data_offsets=..., more=1), "tensor 'a' has no data_offsets"),
    "a field more": bad(one(code=f"{MARK}()"), "needs exactly"),
    "an unknown dtype": bad(one(dtype="F31"), "unknown dtype 'F31'"),
    "a dtype in lower case": bad(one(dtype="f32"), "unknown dtype 'f32'"),
    "a dtype that is a number": bad(one(dtype=32), "unknown dtype 32"),
    "a dtype that is a list": bad(one(dtype=["F32"]), "unknown dtype ['F32']"),
    "a dtype smaller than a byte": bad(one(dtype="F4"), "smaller than a byte"),
    "a size that is negative": bad(one(shape=[-2]), "shape of 'a'", "[-2]"),
    "a size that is a fraction": bad(one(shape=[2.0]), "shape of 'a'"),
    "a size that is true": bad(one(shape=[True, 2]), "shape of 'a'"),
    "a size that is a text": bad(one(shape=["2"]), "shape of 'a'"),
    "a size of 2^63": bad(one(shape=[1 << 63]), "shape of 'a'"),
    "a shape that is a number": bad(one(shape=2), "shape of 'a'"),
    "a product that overflows": bad(one(shape=[1 << 32, 1 << 32]), "too large"),
    "a product that wraps round to the right size": bad(one(shape=[(1 << 62) + 2, 4]), "too large"),
    "zero times 2^63": bad(one(shape=[0, 1 << 62, 4], data_offsets=[0, 0]), "too large"),
    "a thousand dimensions": bad(one(shape=[1] * 1000), "at most 64 integers"),
    "three offsets": bad(one(data_offsets=[0, 8, 16]), "must be two integers"),
    "offsets the wrong way round": bad(one(data_offsets=[8, 0]), "begin <= end"),
    "an offset below zero": bad(one(data_offsets=[-8, 0]), "begin <= end"),
    "an offset that is a fraction": bad(one(data_offsets=[0, 8.0]), "begin <= end"),
    "an offset that is true": bad(one(data_offsets=[0, True]), "begin <= end"),
    "an offset of 2^63": bad(one(data_offsets=[0, 1 << 63]), "begin <= end"),
    "bytes that do not fit the shape": bad(one(shape=[3]), "takes 12 bytes but has 8"),
    "a tensor beyond the end": bad(one(shape=[200], data_offsets=[0, 800]), "truncated", "promises"),
    "bytes after the last tensor": bad(one(data=bytes(12)), "4 bytes after the last tensor"),
    "two tensors that overlap": bad(two((0, 8), (4, 12)), "overlaps the tensor before it"),
    "two tensors at one place": bad(two((0, 8), (0, 8), 8), "overlaps the tensor before it"),
    "a hole between tensors": bad(two((0, 4), (8, 16)), "leaves a hole"),
    "a hole before the first": bad(two((4, 8), (8, 16)), "leaves a hole"),
    "an empty tensor inside another": bad(two((0, 8), (4, 4), 8), "overlaps"),
    "a name that is empty": bad(one(name=""), "has 0 characters"),
    "a name too long": bad(one(name="n" * (MAX_NAME + 1)), f"1 to {MAX_NAME} are allowed"),
    "a name with NUL": bad(one(name="a\0b"), "control characters"),
    "a name with an escape sequence": bad(one(name="\x1b]0;owned\x07"), "control characters"),
    "a name with DEL or C1 controls": bad(one(name="a\x9b2J"), "control characters"),
    "a name with half a surrogate pair": bad(raw(rb'{"\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'), ""),
    "a name that is a path": bad(one(name="../../etc/passwd"), "looks like a path"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return put(tmp_path / "checkpoint", good())


@table(CASES)
def test_refused(directory: Path, row: Case) -> None:
    refused(
        directory,
        row,
        lambda place: read_header(place / FILE),
        AutoModelForCausalLM.from_pretrained,
        lambda place: preview(LlamaForCausalLM, _source(place)),
    )


def _source(place: Path) -> Any:
    from loadstone.loading.source import resolve_source

    return resolve_source(place)
