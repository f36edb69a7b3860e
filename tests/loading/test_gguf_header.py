"""GGUF headers: what gguf's own reader finds in good files; of bad ones nothing is believed."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import peak_memory
import pytest
import tiny
from damage import damaged
from hypothesis import given
from hypothesis import strategies as st

from loadstone.errors import CheckpointError, FormatError, NotFoundError, PathError
from loadstone.loading.gguf_header import KINDS, Array, read_gguf_header


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: str | bytes = "w", sizes: Any = (32, 2), kind: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    count = len(sizes) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def file_of(
    entries: list[bytes],
    tensors: list[bytes],
    data: int = 256,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    count = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, *count) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + bytes(data)


GOOD = file_of([entry("general.architecture", 8, text("llama"))], [tensor()])


def reads(tmp_path: Path, raw: bytes) -> Any:
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    return read_gguf_header(path)


def test_a_good_file(tmp_path: Path) -> None:
    header = reads(tmp_path, GOOD)
    assert header.fields == {"general.architecture": "llama"}
    found = header.tensors["w"]
    assert (found.kind.name, found.shape, found.nbytes) == ("F32", (2, 32), 256)
    assert found.begin + 256 == len(GOOD)
    empty = reads(tmp_path, file_of([], [], 0))
    assert not empty.tensors


scalars = st.one_of(
    st.booleans(), st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False), st.text(max_size=30)
)
arrays = st.one_of(
    st.lists(st.integers(-5, 1000), min_size=1, max_size=10), st.lists(st.text(max_size=9), min_size=1, max_size=10)
)


@tiny.examples(60)
@given(
    fields=st.dictionaries(st.from_regex(r"[a-z]{1,8}\.[a-z_]{1,12}", fullmatch=True), scalars | arrays, max_size=8),
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(1, 6), min_size=1, max_size=4),
            st.sampled_from(
                [kind.name for kind in KINDS.values() if not kind.name.startswith(("I8", "I16", "I3", "I6"))]
            ),
        ),
        max_size=6,
    ),
    alignment=st.sampled_from((None, 32, 64, 8192)),
)
def test_agrees_with_the_reader_of_gguf(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], tensors: Any, alignment: int | None
) -> None:
    gguf = pytest.importorskip("gguf")
    import gguf_files
    import numpy

    path = tmp_path_factory.mktemp("g") / "x.gguf"
    sizes = {kind.name: kind for kind in KINDS.values()}
    made = {}
    for number, (shape, kind) in enumerate(tensors):
        octets = numpy.zeros((*shape[:-1], shape[-1] * sizes[kind].nbytes), dtype=numpy.uint8)
        octets = octets.view({"F32": "f4", "F16": "f2", "F64": "f8"}.get(kind, "u1"))
        made[f"t{number}"] = (octets, kind)
    general = {**fields, **({"general.alignment": alignment} if alignment else {})}
    gguf_files.write(path, made, {}, general=general)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert set(header.fields) == {name for name in reader.fields if not name.startswith("GGUF.")}
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        mine, theirs = header.fields[name], field.contents()
        if isinstance(mine, Array):
            assert mine.length == len(theirs)
            assert mine.values is None or list(mine.values) == theirs
        else:
            assert mine == theirs, name
    assert list(header.tensors) == [one.name for one in reader.tensors]
    for one in reader.tensors:
        mine = header.tensors[one.name]
        assert mine.begin == one.data_offset
        assert mine.nbytes == one.n_bytes
        assert mine.kind.name == one.tensor_type.name
        assert mine.shape == tuple(int(size) for size in reversed(one.shape))


def test_block_sizes_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for number, kind in KINDS.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert kind.name == theirs.name
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.nbytes)


HUGE = (1 << 64) - 1
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "only the magic": (b"GGUF", "truncated"),
    "another file": (b"PK\3\4" + bytes(60), "not a GGUF"),
    "version 1": (file_of([], [], version=1), "version 1"),
    "version 4": (file_of([], [], version=4), "version 4"),
    "big-endian": (file_of([], [], version=3 << 24), "big-endian"),
    "2^64 tensors": (file_of([], [], counts=(HUGE, 0)), "tensors do not fit"),
    "2^64 entries": (file_of([], [], counts=(0, HUGE)), "entries do not fit"),
    "more tensors than there are": (file_of([], [tensor()], counts=(5, 0)), ""),
    "a million tensors": (file_of([], [], counts=(1 << 21, 0), data=80 << 20), "too many"),
    "a key of 2^64 bytes": (file_of([struct.pack("<Q", HUGE) + b"abcdefghijklm"], []), "key of"),
    "a key that is too long": (file_of([entry("k" * 70_000, 4, bytes(4))], []), "key of"),
    "a key twice": (file_of([entry("k", 4, bytes(4))] * 2, []), "twice"),
    "an empty key": (file_of([entry("", 4, bytes(4))], []), "no name"),
    "a key with controls": (file_of([entry("a\nb", 4, bytes(4))], []), "no name"),
    "a key not UTF-8": (file_of([entry(b"\xff\xfe", 4, bytes(4))], []), "malformed"),
    "an unknown type": (file_of([entry("k", 99, bytes(4))], []), "unknown type 99"),
    "a text of 2^64 bytes": (file_of([entry("k", 8, struct.pack("<Q", HUGE))], []), "bytes"),
    "a text beyond the end": (file_of([entry("k", 8, struct.pack("<Q", 5000))], []), "truncated"),
    "a text not UTF-8": (file_of([entry("k", 8, text(b"\xff"))], []), "malformed"),
    "a boolean of 2": (file_of([entry("k", 7, b"\2")], []), "boolean"),
    "an array of 2^64": (file_of([entry("k", 9, struct.pack("<IQ", 4, HUGE))], []), "do not fit"),
    "an array of 2^60 texts": (file_of([entry("k", 9, struct.pack("<IQ", 8, 1 << 60))], []), "do not fit"),
    "texts that lie": (file_of([entry("k", 9, struct.pack("<IQQ", 8, 1, 1 << 60))], []), "truncated"),
    "arrays in an array": (file_of([entry("k", 9, struct.pack("<IQ", 9, 1) + bytes(12))], []), "arrays in an array"),
    "an array of an unknown type": (
        file_of([entry("k", 9, struct.pack("<IQ", 50, 1) + bytes(8))], []),
        "unknown type 50",
    ),
    "an array with a boolean of 3": (file_of([entry("k", 9, struct.pack("<IQ", 7, 1) + b"\3")], []), "boolean"),
    "alignment 0": (file_of([entry("general.alignment", 4, bytes(4))], []), "alignment"),
    "alignment 24": (file_of([entry("general.alignment", 4, struct.pack("<I", 24))], []), "alignment"),
    "alignment of 2^31": (file_of([entry("general.alignment", 4, struct.pack("<I", 1 << 31))], []), "alignment"),
    "alignment as a text": (file_of([entry("general.alignment", 8, text("32"))], []), "alignment"),
    "a tensor twice": (file_of([], [tensor(), tensor(offset=256)], 512), "twice"),
    "no name": (file_of([], [tensor("")]), "name"),
    "a name with controls": (file_of([], [tensor("a\0b")]), "name"),
    "a name of 600 bytes": (file_of([], [tensor("n" * 600)]), "name of"),
    "no dimensions": (file_of([], [tensor(sizes=())]), "dimensions"),
    "five dimensions": (file_of([], [tensor(sizes=(2, 2, 2, 2, 2))]), "dimensions"),
    "2^32 dimensions": (file_of([], [tensor(dims=(1 << 32) - 1)]), "dimensions"),
    "a size of 0": (file_of([], [tensor(sizes=(32, 0))]), "impossible"),
    "sizes that overflow": (file_of([], [tensor(sizes=(1 << 33, 1 << 33))]), "impossible"),
    "sizes of 2^64": (file_of([], [tensor(sizes=(HUGE,))]), "impossible"),
    "rows that fill no blocks": (file_of([], [tensor(sizes=(33,), kind=8)]), "do not fill"),
    "a type that is gone": (file_of([], [tensor(kind=4)]), "type 4"),
    "an unknown kind": (file_of([], [tensor(kind=1000)]), "type 1000"),
    "an offset beyond the end": (file_of([], [tensor(offset=1 << 40)]), "hole"),
    "an offset of 2^64": (file_of([], [tensor(offset=HUGE - 31)]), "hole"),
    "an offset not aligned": (file_of([], [tensor(offset=8)], 512), "not aligned"),
    "tensors that overlap": (file_of([], [tensor("a"), tensor("b", offset=128)], 512), "overlaps"),
    "tensors in one place": (file_of([], [tensor("a"), tensor("b")], 512), "overlaps"),
    "a hole between tensors": (file_of([], [tensor("a"), tensor("b", offset=512)], 1024), "hole"),
    "a tensor cut off": (GOOD[:-1], "truncated"),
    "no data": (file_of([], [tensor()], 0), "truncated"),
    "more data than tensors": (GOOD + bytes(64), "after the last tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    raw, words = BAD[case]
    with pytest.raises(FormatError, match=words) as caught:
        reads(tmp_path, raw)
    assert str(tmp_path / "x.gguf") in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_gguf_header(tmp_path / "none.gguf")
    with pytest.raises(PathError):
        read_gguf_header(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(PathError):
        read_gguf_header(tmp_path / "pipe.gguf")


def test_truncated_anywhere(tmp_path: Path) -> None:
    entries = [entry("a", 8, text("text")), entry("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yy"))]
    whole = file_of(entries, [tensor("one", (32,), 8), tensor("two", (32,), 0, 64)], 64 + 128)
    assert len(reads(tmp_path, whole).tensors) == 2
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            reads(tmp_path, whole[:length])


@tiny.examples(400)
@given(data=st.data())
def test_damaged_files_raise_typed_errors_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    entries = [entry("a", 8, text("text")), entry("b", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yy")),
               entry("c", 9, struct.pack("<IQII", 4, 2, 7, 8)), entry("d", 7, b"\1")]  # fmt: skip
    raw = damaged(file_of(entries, [tensor("one", (32,), 8), tensor("two", (32,), 0, 64)], 64 + 128), data, "length")
    path = tmp_path_factory.mktemp("g") / "x.gguf"
    path.write_bytes(raw)
    said = str(path)
    try:
        header = read_gguf_header(path)
    except CheckpointError as error:
        said = str(error)
    else:
        assert all(one.begin + one.nbytes <= len(raw) for one in header.tensors.values())
    assert str(path) in said


@given(raw=st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("g") / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + raw)
    try:
        header = read_gguf_header(path)
    except FormatError:
        return
    assert not header.tensors or len(raw) > 50


@pytest.mark.skipif(not peak_memory.AVAILABLE, reason="needs /proc")
def test_a_header_costs_no_more_than_its_bytes(tmp_path: Path) -> None:
    """A vocabulary of 300 000 texts is stepped over in a small window; sparse files that claim 100 GB are refused."""
    texts = b"".join(text(f"token {number}") for number in range(300_000))
    entries = [entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 300_000) + texts)]
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of(entries, [tensor()]))
    long = tmp_path / "long.gguf"
    scores = entry("tokenizer.ggml.scores", 9, struct.pack("<IQ", 6, 6 << 20) + bytes(24 << 20))
    long.write_bytes(file_of([scores, *entries], [tensor()]))
    claims = {"a text": entry("k", 8, struct.pack("<Q", 100 << 30)),
              "texts": entry("k", 9, struct.pack("<IQ", 8, 10 << 30)),
              "numbers": entry("k", 9, struct.pack("<IQ", 4, 20 << 30))}  # fmt: skip
    bombs = []
    for name, claim in claims.items():
        bombs.append(str(tmp_path / f"{name}.gguf"))
        Path(bombs[-1]).write_bytes(file_of([claim], []))
        os.truncate(bombs[-1], 101 << 30)
    setup = f"""
from loadstone.errors import FormatError
from loadstone.loading.gguf_header import read_gguf_header
try:
    read_gguf_header({str(tmp_path / "none")!r})
except OSError:
    pass
"""
    work = f"""
assert read_gguf_header({str(path)!r}).fields["tokenizer.ggml.tokens"].length == 300_000
assert read_gguf_header({str(long)!r}).fields["tokenizer.ggml.tokens"].length == 300_000
for bomb in {bombs!r}:
    try:
        read_gguf_header(bomb)
    except FormatError:
        continue
    raise SystemExit(1)
"""
    assert peak_memory.peak_of(work, setup) < 12e6
