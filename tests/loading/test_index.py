"""Indexes and how checkpoints are opened: which files, which errors, before any weight is read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from loadstone.errors import (
    ArgumentError,
    CheckpointError,
    FormatError,
    IntegrityError,
    MissingWeightsError,
    NotFoundError,
    PathError,
    UnsafeFormatError,
)
from loadstone.loading import index as index_module
from loadstone.loading.index import read_index

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def indexed(directory: Path, content: Any) -> Path:
    path = directory / INDEX
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


BAD = {
    "not JSON": (b"{", FormatError, "JSON"),
    "not UTF-8": (b"\xff\xfe{}", FormatError, "JSON"),
    "NaN": (b'{"weight_map": {"a": NaN}}', FormatError, "JSON"),
    "deep": (b'{"a":' * 90_000, FormatError, "deep"),
    "a list": ([], FormatError, "an array"),
    "no weight_map": ({"metadata": {}}, FormatError, "missing"),
    "empty weight_map": ({"weight_map": {}}, FormatError, "empty"),
    "weight_map a list": ({"weight_map": ["a"]}, FormatError, "an array"),
    "weight_map of numbers": ({"weight_map": {"a": 1}}, FormatError, "'a'"),
    "key twice": (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', FormatError, "twice"),
    "parent": ({"weight_map": {"a": "../x.safetensors"}}, PathError, "../x"),
    "absolute": ({"weight_map": {"a": "/etc/x.safetensors"}}, PathError, "/etc"),
    "drive": ({"weight_map": {"a": "C:\\x.safetensors"}}, PathError, "inside"),
    "share": ({"weight_map": {"a": "\\\\host\\x.safetensors"}}, PathError, "inside"),
    "no name": ({"weight_map": {"a": ""}}, PathError, "inside"),
    "NUL": ({"weight_map": {"a": "x\0.safetensors"}}, PathError, "inside"),
    "pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, UnsafeFormatError, "pytorch_model.bin"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_indexes(tmp_path: Path, case: str) -> None:
    content, kind, words = BAD[case]
    path = indexed(tmp_path, content)
    with pytest.raises(kind) as caught:
        toy.opened(tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["weight_map", "metadata", "total_size", "a"]), inner)
        ),
    )
)
def test_any_index_raises_typed_errors_or_reads(tmp_path: Path, content: Any) -> None:  # fmt: skip
    path = indexed(tmp_path, content)
    refusal = str(path)
    try:
        read_index(path)
    except CheckpointError as error:
        refusal = str(error)
    assert str(path) in refusal


def test_index_size_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_INDEX", 100)
    with pytest.raises(FormatError, match="at most 100"):
        read_index(indexed(tmp_path, {"weight_map": {"a" * 100: SHARD}}))


@pytest.mark.parametrize("content", [{}, {"metadata": None}, {"metadata": {"total_size": 4.0}}])
def test_index_without_or_with_odd_metadata(tmp_path: Path, content: dict, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SHARD)
    indexed(tmp_path, {"weight_map": {"a": SHARD}, **content})
    assert set(toy.opened(tmp_path).entries) == {"a"}
    assert not caplog.records


def test_total_size_that_differs_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SHARD)
    indexed(tmp_path, {"metadata": {"total_size": 5}, "weight_map": {"a": SHARD}})
    with caplog.at_level(logging.WARNING, "loadstone.loading"):
        checkpoint = toy.opened(tmp_path)
    assert "total_size 5" in caplog.text
    assert checkpoint.total_bytes == 4
    assert len(checkpoint.index_faults) == 1


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights(), shards=4)
    for number in (2, 4):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    with pytest.raises(MissingWeightsError) as caught:
        toy.opened(tmp_path)
    assert "model-00002-of-00004" in str(caught.value)
    assert "model-00004-of-00004" in str(caught.value)


def test_tensor_not_where_the_index_says(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    indexed(tmp_path, {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}})
    with pytest.raises(IntegrityError, match=r"'a' is in model-1.safetensors, not in model-2.safetensors"):
        toy.opened(tmp_path)
    indexed(
        tmp_path, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}
    )
    with pytest.raises(IntegrityError, match="'c' is not in model-2"):
        toy.opened(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(1), "a": torch.ones(1)}, tmp_path / "model-2.safetensors")
    indexed(tmp_path, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    with pytest.raises(IntegrityError, match="both in"):
        toy.opened(tmp_path)


def test_tensor_the_index_does_not_list_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / SHARD)
    indexed(tmp_path, {"weight_map": {"a": SHARD}})
    assert set(toy.opened(tmp_path).entries) == {"a", "b"}
    assert "'b'" in caplog.text


def test_single_file_goes_before_the_index(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights(), shards=2)
    save_file({"single": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(toy.opened(tmp_path).entries) == {"single"}


def test_variants(tmp_path: Path) -> None:
    save_file({"plain": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(NotFoundError, match=r"variant=None"):
        toy.opened(tmp_path, variant="fp16")
    save_file({"half": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert set(toy.opened(tmp_path, variant="fp16").entries) == {"half"}
    shard = "model.bf16-00001-of-00001.safetensors"
    save_file({"brain": torch.ones(1)}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.bf16.json").write_text(json.dumps({"weight_map": {"brain": shard}}))
    assert set(toy.opened(tmp_path, variant="bf16").entries) == {"brain"}
    for variant in ("../x", "", "a/b", 16, ".."):
        with pytest.raises(ArgumentError):
            toy.opened(tmp_path, variant=variant)


def test_only_a_variant_is_there(tmp_path: Path) -> None:
    save_file({"half": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(NotFoundError, match="variant='fp16'"):
        toy.opened(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "tf_model.h5", "flax_model.msgpack", "m.pt"])
def test_only_formats_that_run_code(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(UnsafeFormatError) as caught:
        toy.opened(tmp_path)
    assert name in str(caught.value)
    assert "use_safetensors=False" in str(caught.value)


def test_pickled_weights_are_not_taken_for_others(tmp_path: Path) -> None:
    toy.save(tmp_path, toy.weights())
    with pytest.raises(NotFoundError, match="use_safetensors=False"):
        toy.opened(tmp_path, use_safetensors=False)
    assert toy.opened(tmp_path, use_safetensors=True).entries


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(NotFoundError) as caught:
        toy.opened(tmp_path)
    for words in ("model.safetensors", INDEX, "README.md"):
        assert words in str(caught.value)
    save_file({"a": torch.ones(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(NotFoundError, match=r"rename 'adapter.safetensors'"):
        toy.opened(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(MissingWeightsError, match="index"):
        toy.opened(tmp_path)


def test_what_a_checkpoint_knows(tmp_path: Path) -> None:
    tensors = toy.weights()
    checkpoint = toy.opened(toy.save(tmp_path, tensors, shards=3))
    assert set(checkpoint.entries) == set(tensors)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert [path.name for path in checkpoint.files] == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert checkpoint.metadata == {"format": "pt"}
    files = [entry.file for entry in checkpoint.entries.values()]
    assert files == sorted(files)
    assert checkpoint.changed_files() == []
