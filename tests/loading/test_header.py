"""The header reader: equal to safetensors' own on good files, typed errors on all others, fast."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from loadstone.errors import CheckpointError, FormatError, NotFoundError, PathError
from loadstone.loading.header import DTYPES, read_header

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


dtypes = st.sampled_from([dtype for dtype in DTYPES.values() if dtype is not torch.float8_e8m0fnu])
names = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda name: "../" not in name and "..\\" not in name and name != "__metadata__"
)
shapes = st.lists(st.integers(0, 5), max_size=4)


@given(
    st.dictionaries(names, st.tuples(dtypes, shapes), max_size=6), st.none() | st.dictionaries(names, names, min_size=1)
)
def test_reads_what_safetensors_writes(tmp_path: Path, spec: dict, metadata: dict | None) -> None:
    # not metadata={}: save_file 0.8.0 then writes a header that is no JSON, which its own reader refuses too
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.items()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata=metadata)
    header = read_header(path)
    with safe_open(path, "pt") as peer:
        assert set(header.entries) == set(peer.keys()) == set(tensors)
        assert header.metadata == (peer.metadata() or {})
    for name, entry in header.entries.items():
        assert (entry.dtype, entry.shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        assert (entry.nbytes, entry.file) == (tensors[name].nbytes, path)
    offsets = [entry.offset for entry in header.entries.values()]
    assert offsets == sorted(offsets)


def test_offsets_are_absolute(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.int16)
    save_file({"a": torch.ones(3), "b": tensor}, tmp_path / "x.safetensors")
    entry = read_header(tmp_path / "x.safetensors").entries["b"]
    raw = (tmp_path / "x.safetensors").read_bytes()[entry.offset : entry.offset + entry.nbytes]
    assert raw == tensor.numpy().tobytes()


def read_or_refuse(read: Callable[[Path], Any], path: Path) -> Any:
    """What ``read`` returns; None if it raises a typed error, which must name the file."""
    refusal = ""
    try:
        return read(path)
    except CheckpointError as error:
        refusal = str(error)
    assert str(path) in refusal
    return None


BASE = save({"layer.0.weight": torch.zeros(4, 3), "layer.1.bias": torch.ones(5, dtype=torch.float16)}, {"format": "pt"})


@given(st.data())
def test_mutations_raise_typed_errors_or_read(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(BASE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "digit"]))
        if kind == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        elif raw:
            raw[at] = data.draw(st.sampled_from(list(b'0123456789-.eE[]{}",:')))
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    header = read_or_refuse(read_header, path)
    if header is None:
        return
    with safe_open(path, "pt") as peer:  # what we let pass, the strict peer reads alike
        assert set(peer.keys()) == set(header.entries)
        for name, entry in header.entries.items():
            assert tuple(peer.get_slice(name).get_shape()) == entry.shape


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner)
        ),
    )
)
def test_any_json_raises_typed_errors_or_reads(tmp_path: Path, content: Any) -> None:  # fmt: skip
    path = write(tmp_path / "x.safetensors", json.dumps(content).encode(), b"\0" * 8)
    read_or_refuse(read_header, path)


def entry(**change: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **change}}


F32_4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_HEADERS = {
    "not JSON": (b"{nope", "JSON"),
    "a list": (b"[1, 2, 3]", "start with"),
    "leading space": (b" {}", "start with"),
    "not UTF-8": (b'{"\xff": 1}', "UTF-8"),
    "NaN": (b'{"a": NaN}', "JSON"),
    "nested deep": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "deep"),
    "lists nested deep": (b'{"a":' + b"[" * 100_000, "deep"),
    "name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]).encode(),) * 2), "'a' is there twice"),
    "field twice": (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **GOOD}, "__metadata__"),
    "metadata a list": ({"__metadata__": ["a"], **GOOD}, "__metadata__"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4], "x": 1}}, "no dtype"),
    "more fields": (entry(codec="zstd"), "exactly"),
    "tensor a number": ({"a": 3}, "exactly"),
    "unknown dtype": (entry(dtype="F31"), "'F31'"),
    "dtype of six bits": (entry(dtype="F6_E2M3"), "smaller than a byte"),
    "dtype a number": (entry(dtype=32), "unknown dtype 32"),
    "dtype a list": (entry(dtype=[]), "unknown dtype"),
    "negative size": (entry(shape=[-2, -3]), "integers"),
    "float size": (entry(shape=[2.0, 3]), "integers"),
    "true for a size": (entry(shape=[True, 6]), "integers"),
    "size 2^63": (entry(shape=[0, 2**63], data_offsets=[0, 0]), "integers"),
    "size of 5000 digits": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,0]}}' % (b"9" * 5000), ""),
    "product too large": (entry(shape=[2**40, 2**40]), "too large"),
    "product too large but empty": (entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), "too large"),
    "100 dimensions": (entry(shape=[1] * 100, data_offsets=[0, 4]), "at most"),
    "shape a string": (entry(shape="23"), "shape"),
    "bytes do not fit": (entry(shape=[2, 2]), "takes 16 bytes but has 24"),
    "end before begin": (entry(data_offsets=[24, 0]), "begin <= end"),
    "negative offset": (entry(data_offsets=[-24, 0]), "begin <= end"),
    "float offset": (entry(data_offsets=[0.0, 24.0]), "begin <= end"),
    "three offsets": (entry(data_offsets=[0, 24, 48]), "two integers"),
    "overlap": ({**GOOD, "b": {"dtype": "F32", "shape": [2], "data_offsets": [20, 28]}}, "overlaps"),
    "same range twice": ({**GOOD, "b": GOOD["a"]}, "overlaps"),
    "hole": ({"b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}, "a": F32_4}, "hole"),
    "hole at the start": ({"b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, "hole"),
    "past the end": (entry(shape=[7], data_offsets=[0, 28]), "truncated"),
    "trailing bytes": (entry(shape=[5], data_offsets=[0, 20]), "4 bytes after"),
    "empty name": ({"": GOOD["a"]}, "0 characters"),
    "name with NUL": ({"a\0b": GOOD["a"]}, "control"),
    "name like a path": ({"../a": GOOD["a"]}, "path"),
    "name of 513": ({"a" * 513: GOOD["a"]}, "513 characters"),
    "half a surrogate": (b'{"\\ud800": %s}' % json.dumps(GOOD["a"]).encode(), "control"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(tmp_path: Path, case: str) -> None:
    header, words = BAD_HEADERS[case]
    path = write(tmp_path / "model.safetensors", header, b"\0" * 24)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


OTHER_FILES = {
    "empty": (b"", "empty"),
    "seven bytes": (b"\1" * 7, "too short"),
    "zeros": (b"\0" * 8, "zeros"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "limit"),
    "length 2^64-1": (b"\xff" * 8 + b"{}", "limit"),
    "length over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "limit"),
    "length past the end": (struct.pack("<Q", 1000) + b'{"a": 1}', "truncated"),
    "length 1": (struct.pack("<Q", 1) + b"{}", "cannot hold"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n", "git lfs pull"),
    "zip": (b"PK\x03\x04" + b"\0" * 30, "zip"),
    "pickle": (b"\x80\x04\x95" + b"\x11" * 30, "pickle"),
    "GGUF": (b"GGUF\3\0\0\0\1\1\1\1", "GGUF"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\1\1", "gzip"),
    "JSON": (b'{"weight_map": {}}', "JSON"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_files(tmp_path: Path, case: str) -> None:
    content, words = OTHER_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(PathError, match="regular"):
        read_header(tmp_path)
    with pytest.raises(PathError):
        read_header(f"{tmp_path}/a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(20)
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(PathError, match="regular"):
        read_header(tmp_path / "model.safetensors")


def test_long_header_is_read_in_full(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.weight": torch.zeros(1, dtype=torch.uint8) for number in range(3000)}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert set(header.entries) == set(tensors)


def test_a_tensor_without_elements(tmp_path: Path) -> None:
    save_file({"a": torch.empty(0, 4), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors").entries
    assert (entries["a"].nbytes, entries["a"].shape, entries["b"].nbytes) == (0, (0, 4), 8)
