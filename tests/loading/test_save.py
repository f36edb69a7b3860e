"""What is saved: bytes, names, shards, ties, modes, and what stays in the directory."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from loadstone.errors import CheckpointError, PathError
from loadstone.loading.checkpoint import open_checkpoint
from loadstone.loading.header import name_fault
from loadstone.loading.save import WeightNames, parse_size, plan_shards, save_checkpoint
from loadstone.loading.source import resolve_source
from loadstone.loading.writer import DTYPE_NAMES

TEXTS = {"config.json": '{"a": 1}'}


def weights(directory: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors as a transformers-style reader finds them: one file first, then the index."""
    names = WeightNames(variant)
    if (directory / names.single).exists():
        return load_file(directory / names.single)
    index = json.loads((directory / names.index).read_text())
    loaded = {name: load_file(directory / name) for name in set(index["weight_map"].values())}
    return {name: loaded[file][name] for name, file in index["weight_map"].items()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = (one.clone(memory_format=torch.contiguous_format).reshape(-1) for one in (left, right))
    return left.view(torch.uint8).equal(right.view(torch.uint8))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPE_NAMES, key=str)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    kind = draw(st.sampled_from(["plain", "transposed", "strided", "view"]))
    if kind == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if kind == "strided" and tensor.dim() and tensor.shape[0]:
        return tensor[::2]
    if kind == "view" and tensor.dim() and tensor.shape[0] > 1:
        return tensor[1:]
    return tensor


@settings(max_examples=40, deadline=None)
@given(
    state=st.dictionaries(st.text(min_size=1, max_size=8), tensors(), max_size=6),
    limit=st.integers(1, 400),
    variant=st.sampled_from([None, "fp16"]),
)
def test_read_back_equal(
    state: dict[str, torch.Tensor], limit: int, variant: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("save") / "model"
    for name in [name for name in state if name_fault(name)]:  # what no reader takes is not written
        with pytest.raises(CheckpointError, match="cannot be the name of a tensor"):
            save_checkpoint(directory, state, texts=TEXTS)
        assert not directory.exists()
        del state[name]
    written = save_checkpoint(directory, state, texts=TEXTS, max_shard_size=limit, variant=variant)
    assert sorted(os.listdir(directory)) == sorted(written)
    back = weights(directory, variant)
    assert back.keys() == state.keys()
    assert all(same(back[name], state[name]) for name in state)
    again = open_checkpoint(resolve_source(directory), variant=variant)
    assert {name: (entry.dtype, entry.shape) for name, entry in again.entries.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()
    }
    names = WeightNames(variant)
    for file in (name for name in written if name.endswith(".safetensors")):
        with safe_open(directory / file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            sizes = [reader.get_tensor(name).nbytes for name in reader.keys()]  # noqa: SIM118
        assert sum(sizes) <= limit or len([size for size in sizes if size]) == 1
        assert int.from_bytes((directory / file).read_bytes()[:8], "little") % 64 == 56  # data begins at 64 bytes
    if names.index in written:
        index = json.loads((directory / names.index).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
        assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in state.values())
        assert list(index["weight_map"]) == sorted(state)
    else:
        assert sum(tensor.nbytes for tensor in state.values()) <= limit or len(state) < 2 or names.single in written


def test_shard_names_are_those_of_the_hub(tmp_path: Path) -> None:
    state = {name: torch.zeros(10) for name in "abc"}
    assert save_checkpoint(tmp_path / "m", state, texts=TEXTS, max_shard_size=40) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "config.json",
    ]
    assert save_checkpoint(tmp_path / "v", state, texts={}, max_shard_size="80B", variant="fp16") == [
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
    ]
    assert save_checkpoint(tmp_path / "s", state, texts={}, variant="fp16") == ["model.fp16.safetensors"]


def test_sizes() -> None:
    for text, size in {"5MB": 5_000_000, "5MiB": 5 << 20, "1.5 gb": 1_500_000_000, "7": 7, 12: 12, "2KB": 2000}.items():
        assert parse_size(text) == size


@pytest.mark.parametrize("size", ["", "5 apples", "-1GB", 0, -3, "0MB", 1.5, None, True, "GB", "nan", "infGB"])
def test_bad_size_is_refused_before_anything_is_written(tmp_path: Path, size: object) -> None:
    with pytest.raises(CheckpointError, match="max_shard_size="):
        save_checkpoint(tmp_path / "m", {"a": torch.zeros(1)}, texts=TEXTS, max_shard_size=size)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_large_tensor_has_a_shard_of_its_own() -> None:
    state = {"a": torch.zeros(1), "big": torch.zeros(100), "b": torch.zeros(1), "c": torch.zeros(1)}
    assert [list(shard) for shard in plan_shards(state, 8)] == [["a"], ["big"], ["b", "c"]]
    assert plan_shards({}, 8) == [{}]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "m", {name: torch.zeros(2) for name in "ab"}, texts=TEXTS, max_shard_size=8)
    finally:
        os.umask(before)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (tmp_path / "m").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_declared_ties_are_dropped(tmp_path: Path) -> None:
    embed = torch.randn(4, 3)
    state = {"lm_head.weight": embed, "embed.weight": embed, "norm": torch.ones(3)}
    save_checkpoint(tmp_path / "m", state, texts=TEXTS, tied={"lm_head.weight"})
    assert weights(tmp_path / "m").keys() == {"embed.weight", "norm"}


def test_declared_ties_with_memory_of_their_own_are_kept(tmp_path: Path) -> None:
    state = {"lm_head.weight": torch.ones(4, 3), "embed.weight": torch.zeros(4, 3)}
    save_checkpoint(tmp_path / "m", state, texts=TEXTS, tied={"lm_head.weight"})
    assert all(same(tensor, state[name]) for name, tensor in weights(tmp_path / "m").items())
    assert weights(tmp_path / "m").keys() == state.keys()


def test_at_least_one_of_a_tie_is_kept(tmp_path: Path) -> None:
    embed = torch.randn(1, 3)
    state = {"a": embed, "b": embed.as_strided((1, 3), (77, 1)), "c": embed}
    save_checkpoint(tmp_path / "m", state, texts=TEXTS, tied={"a", "b", "c"})
    assert list(weights(tmp_path / "m")) == ["a"]


@pytest.mark.parametrize("kind", ["identical", "overlapping", "dtype"])
def test_undeclared_sharing_is_refused(tmp_path: Path, kind: str) -> None:
    one = torch.randn(6)
    other = {"identical": one, "overlapping": one[2:], "dtype": one.view(torch.int32)}[kind]
    with pytest.raises(CheckpointError, match=r"'one', 'other' share memory.*clone"):
        save_checkpoint(tmp_path / "m", {"one": one, "other": other}, texts=TEXTS)
    assert os.listdir(tmp_path) == []


def test_disjoint_views_are_saved_by_themselves(tmp_path: Path) -> None:
    whole = torch.randn(100, 10)
    save_checkpoint(tmp_path / "m", {"a": whole[:1], "b": whole[1:2]}, texts={})
    back = weights(tmp_path / "m")
    assert same(back["a"], whole[:1])
    assert same(back["b"], whole[1:2])
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 400


def test_conjugate_and_negative_views(tmp_path: Path) -> None:
    value = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64)
    save_checkpoint(tmp_path / "m", {"conj": value.conj(), "imag": value.clone().conj().imag}, texts={})
    back = weights(tmp_path / "m")
    assert back["conj"].tolist() == [1 - 2j, 3 + 1j]
    assert back["imag"].tolist() == [-2, 1]


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(3, device="meta"), "meta device"),
        (torch.eye(3).to_sparse(), "dense"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        ([1.0], "is a list"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, tensor: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        save_checkpoint(tmp_path / "m", {"the.name": tensor}, texts=TEXTS)  # type: ignore[dict-item]
    assert "'the.name'" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a\0b", "__metadata__", "a\x1b[2J", "a\x9b", "\ud800", "../a", "n" * 513])
def test_bad_tensor_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name"):
        save_checkpoint(tmp_path / "m", {name: torch.zeros(1)}, texts=TEXTS)


@pytest.mark.parametrize("name", ["../x", "a//b", "/x", "", "model.safetensors", "model.safetensors.index.json"])
def test_bad_text_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(PathError):
        save_checkpoint(tmp_path / "m", {"a": torch.zeros(1)}, texts={name: "x"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("variant", ["", "../x", "a/b", ".", "a b"])
def test_bad_variants(tmp_path: Path, variant: str) -> None:
    with pytest.raises(PathError, match="variant="):
        save_checkpoint(tmp_path / "m", {"a": torch.zeros(1)}, texts=TEXTS, variant=variant)


def test_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(PathError, match="it is a file"):
        save_checkpoint(tmp_path / "m", {"a": torch.zeros(1)}, texts=TEXTS)
    assert (tmp_path / "m").read_text() == "mine"
    assert os.listdir(tmp_path) == ["m"]


def test_parents_are_made_and_links_followed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x" / "y" / "m", {"a": torch.zeros(1)}, texts=TEXTS)
    (tmp_path / "link").symlink_to(tmp_path / "x" / "y" / "m")
    save_checkpoint(tmp_path / "link", {"b": torch.zeros(1)}, texts=TEXTS)
    assert (tmp_path / "link").is_symlink()
    assert list(weights(tmp_path / "x" / "y" / "m")) == ["b"]


def fill(directory: Path) -> dict[str, bytes]:
    """Foreign files, as they must be found again."""
    (directory / "runs" / "deep").mkdir(parents=True)
    for name in ("tokenizer.json", "README.md", "runs/events", "runs/deep/x", "model-notes.safetensors", ".hidden"):
        (directory / name).write_text(name)
    (directory / "link").symlink_to("tokenizer.json")
    (directory / "runs").chmod(0o750)
    return contents(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", [False, True], ids=["exchange", "in place"])
def test_stale_weights_go_and_foreign_files_stay(
    tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "m"
    state = {name: torch.randn(10) for name in "abcd"}
    target.mkdir()
    foreign = fill(target)
    save_checkpoint(target, state, texts={}, max_shard_size=40, variant="fp16")
    foreign = contents(target)
    target.chmod(0o751)
    inode = (target / "tokenizer.json").stat().st_ino
    if inside:
        monkeypatch.chdir(target)
    for limit in (40, 80, 80, "1GB", 40, "1GB"):
        with caplog.at_level(logging.WARNING):
            written = save_checkpoint(target, state, texts=TEXTS, max_shard_size=limit)
        now = contents(target)
        assert now.keys() == foreign.keys() | set(written)
        assert {name: now[name] for name in foreign} == foreign
        assert all(same(tensor, state[name]) for name, tensor in weights(target).items())
        assert weights(target, "fp16").keys() == state.keys()
    assert [record.message for record in caplog.records if "working directory" in record.message] or not inside
    assert inside or not caplog.records
    assert target.stat().st_mode & 0o777 == 0o751
    assert (target / "runs").stat().st_mode & 0o777 == 0o750
    assert (target / "tokenizer.json").stat().st_ino == inode
    assert (target / "link").is_symlink()
    assert os.listdir(tmp_path) == ["m"]


def test_single_file_replaces_shards_and_the_reverse(tmp_path: Path) -> None:
    state = {name: torch.randn(10) for name in "abc"}
    save_checkpoint(tmp_path, state, texts=TEXTS, max_shard_size=40)
    assert set(save_checkpoint(tmp_path, state, texts=TEXTS)) == set(os.listdir(tmp_path))
    assert set(save_checkpoint(tmp_path, state, texts=TEXTS, max_shard_size=80)) == set(os.listdir(tmp_path))


def test_saving_over_the_mapped_directory(tmp_path: Path) -> None:
    state = {name: torch.randn(300, 300) for name in "abc"}
    save_checkpoint(tmp_path / "m", state, texts=TEXTS, max_shard_size="400KB")
    for limit in ("400KB", "800KB", "1GB", "1GB"):
        mapped = weights(tmp_path / "m")  # load_file maps
        mapped["a"].add_(1)
        state["a"] += 1
        save_checkpoint(tmp_path / "m", mapped, texts=TEXTS, max_shard_size=limit)
        assert all(same(mapped[name], state[name]) for name in state)
        assert all(same(tensor, state[name]) for name, tensor in weights(tmp_path / "m").items())


def test_fallback_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    save_checkpoint(tmp_path / "m", {"a": torch.zeros(2)}, texts=TEXTS)
    (tmp_path / "m" / "tokenizer.json").write_text("t")
    monkeypatch.setattr(os, "link", refuse)
    with caplog.at_level(logging.WARNING):
        save_checkpoint(tmp_path / "m", {"b": torch.ones(2)}, texts=TEXTS)
    assert "cannot be linked" in caplog.text
    assert list(weights(tmp_path / "m")) == ["b"]
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert os.listdir(tmp_path) == ["m"]


def test_files_made_during_the_save_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.loading import atomic

    target = tmp_path / "m"
    save_checkpoint(target, {"a": torch.zeros(2)}, texts=TEXTS)
    (target / "runs").mkdir()
    (target / "log").write_text("old")
    exchange = atomic._exchange

    def late(first: Path, second: Path) -> None:
        (target / "runs" / "events").write_text("late")
        (target / "new.log").write_text("late")
        (target / "log").unlink()
        (target / "log").write_text("replaced")
        exchange(first, second)

    monkeypatch.setattr(atomic, "_exchange", late)
    save_checkpoint(target, {"b": torch.zeros(2)}, texts=TEXTS)
    assert (target / "runs" / "events").read_text() == "late"
    assert (target / "new.log").read_text() == "late"
    assert (target / "log").read_text() == "replaced"
    assert list(weights(target)) == ["b"]


def test_private_memory_is_not_needed(tmp_path: Path) -> None:
    code = f"""
import torch, resource
from loadstone.loading.save import save_checkpoint
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
state = {{f"l{{i}}": torch.ones(1 << 20) for i in range(16)}}
save_checkpoint({str(tmp_path / "w")!r}, {{"a": torch.ones(4)}}, texts={{}})
before, peak = anonymous(), 0
from loadstone.loading import writer
plain = writer.pieces_of
def measured(*args):
    global peak
    for piece in plain(*args):
        yield piece
        peak = max(peak, anonymous())
writer.pieces_of = measured
save_checkpoint({str(tmp_path / "m")!r}, state, texts={{}})
print(peak - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) < 8 << 20, done.stderr  # 64 MiB are saved
