"""Bytes on their way: mapped, cast, copied; whose memory they are, and that files never change."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from loadstone.errors import IntegrityError
from loadstone.loading import arena, fill, workers
from loadstone.loading.load import load_into

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.safetensors")}


def anonymous_kb() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


@given(st.data())
def test_any_tensors_of_any_dtype(tmp_path: Path, data: st.DataObject) -> None:
    shapes = st.lists(st.integers(0, 7), max_size=3)
    dtypes = st.sampled_from([*FLOATS, torch.int64, torch.uint8, torch.bool, torch.int8])
    spec = data.draw(st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=6))
    target = data.draw(st.sampled_from([None, *FLOATS]))
    tensors = {f"t{number}": (torch.randn(shape) * 4).to(dtype) for number, (shape, dtype) in enumerate(spec)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = toy.Bag(tensors, target)
    report = load_into(model, toy.opened(tmp_path), strict=True)
    for name, tensor in tensors.items():
        loaded = getattr(model, name)
        wanted = tensor.to(target) if target is not None and tensor.is_floating_point() else tensor
        assert loaded.dtype == wanted.dtype
        assert torch.equal(loaded.detach(), wanted)
        assert loaded.untyped_storage().nbytes() == wanted.nbytes
        assert loaded.requires_grad == wanted.is_floating_point()
        assert type(loaded) is nn.Parameter
    assert report.bytes_mapped + report.bytes_copied == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_models_load_bit_for_bit(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    tensors = toy.weights(dtype=dtype)
    model, report = toy.load(toy.save(tmp_path, tensors, shards), model=toy.meta(dtype))
    assert toy.same(model, tensors)
    assert (report.bytes_mapped, report.bytes_copied) == (sum(tensor.nbytes for tensor in tensors.values()), 0)


@given(st.integers(1, 300), st.integers(1, 4), st.sampled_from(FLOATS), st.sampled_from(FLOATS))
@settings(max_examples=30)
def test_pieces_cover_all(tmp_path: Path, piece: int, threads: int, dtype: torch.dtype, target: torch.dtype) -> None:
    tensors = {f"t{number}": torch.randn(number * 37 + 1).to(dtype) for number in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "PIECE", piece * target.itemsize)
        patch.setattr(workers, "cores", lambda: threads)
        model = toy.Bag(tensors, target)
        load_into(model, toy.opened(tmp_path))
    assert all(torch.equal(getattr(model, name), tensor.to(target)) for name, tensor in tensors.items())


def test_large_tensors_are_cast_by_several_threads(tmp_path: Path) -> None:
    tensors = {"big": torch.randn(3_000_001).bfloat16(), "odd": torch.randn(1001, 701).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    model, threads = toy.Bag(tensors, torch.float32), torch.get_num_threads()
    load_into(model, toy.opened(tmp_path))
    assert torch.get_num_threads() == threads, "the global setting is put back"
    assert torch.equal(model.big, tensors["big"].float())
    assert torch.equal(model.odd, tensors["odd"].float())
    assert model.big.data_ptr() % arena.HUGE == 0


@pytest.mark.parametrize("pad", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("target", [torch.float32, torch.float16])
def test_tensors_not_aligned_in_their_file(tmp_path: Path, pad: int, target: torch.dtype) -> None:
    tensor = torch.randn(2000)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2000], "data_offsets": [0, 8000]}}).encode()
    header += b" " * (-len(header) % 8 + pad)
    raw = struct.pack("<Q", len(header)) + header + tensor.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    model = toy.Bag({"a": tensor}, target)
    report = load_into(model, toy.opened(tmp_path))
    assert torch.equal(model.a.detach(), tensor.to(target))
    assert model.a.data_ptr() % target.itemsize == 0
    assert bool(report.bytes_mapped) == (pad == 4 and target == torch.float32)


def test_training_in_place_leaves_the_files_unchanged(tmp_path: Path) -> None:
    before = digest(toy.save(tmp_path, toy.weights(), shards=2))
    model, _ = toy.load(tmp_path)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    sum((parameter**2).sum() for parameter in model.parameters()).backward()
    optimizer.step()
    with torch.no_grad():
        model.model.scale.zero_()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    assert not torch.equal(model.lm_head.weight, toy.weights()["lm_head.weight"])
    assert digest(tmp_path) == before
    again, _ = toy.load(tmp_path)
    assert toy.same(again, toy.weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_one_parameter_saves_one_parameter(tmp_path: Path, dtype: torch.dtype) -> None:
    toy.save(tmp_path, {**toy.weights(), "filler": torch.zeros(1_000_000)})
    model, _ = toy.load(tmp_path, toy.meta(dtype))
    buffer = io.BytesIO()
    torch.save(model.model.scale, buffer)
    assert len(buffer.getvalue()) < 4096


def test_the_model_outlives_its_files_and_the_checkpoint(tmp_path: Path) -> None:
    tensors = toy.weights()
    model, _ = toy.load(toy.save(tmp_path, tensors, shards=2))
    for path in tmp_path.iterdir():
        path.unlink()
    gc.collect()
    assert toy.same(model, tensors)
    (tmp_path / "model.safetensors").write_bytes(b"other bytes")
    assert toy.same(model, tensors)


def test_replacing_a_file_by_renaming_is_harmless(tmp_path: Path) -> None:
    model, _ = toy.load(toy.save(tmp_path / "a", toy.weights(0)))
    toy.save(tmp_path / "b", toy.weights(1))
    os.replace(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    assert toy.same(model, toy.weights(0))


def test_state_dicts_and_copies_are_ordinary(tmp_path: Path) -> None:
    import copy
    import pickle

    model, _ = toy.load(toy.save(tmp_path, toy.weights()))
    assert toy.same(copy.deepcopy(model), toy.weights())
    assert toy.same(pickle.loads(pickle.dumps(model)), toy.weights())
    assert model.to(torch.float64).lm_head.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_changes_meanwhile(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = toy.opened(toy.save(tmp_path, toy.weights(), shards=2))
    path = checkpoint.files[1]
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[:-1] + b"\x7f")
    model = toy.meta(dtype)
    with pytest.raises(IntegrityError, match=path.name):
        load_into(model, checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("change", ["truncated", "deleted"])
def test_a_file_that_shrinks_or_goes_before_it_is_mapped(tmp_path: Path, change: str) -> None:
    checkpoint = toy.opened(toy.save(tmp_path, toy.weights()))
    if change == "truncated":
        os.truncate(checkpoint.files[0], 5000)
    else:
        checkpoint.files[0].unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        load_into(toy.meta(), checkpoint)


@linux
def test_memory_of_a_cast_is_its_result_and_is_given_back_tensor_by_tensor(tmp_path: Path) -> None:
    count = 4 << 20
    tensors = {f"t{number}": torch.ones(count, dtype=torch.bfloat16) for number in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = toy.Bag(tensors, torch.float32)
    del tensors
    gc.collect()
    before = anonymous_kb()
    load_into(model, toy.opened(tmp_path))
    result = 4 * count * 4 // 1024
    assert result * 0.9 < anonymous_kb() - before < result * 1.25
    del model.t0
    assert anonymous_kb() - before < result * 0.75 * 1.25
    del model
    gc.collect()
    assert anonymous_kb() - before < result * 0.25


@linux
def test_mapping_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(16 << 20)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = toy.Bag(tensors)
    del tensors
    gc.collect()
    before = anonymous_kb()
    load_into(model, toy.opened(tmp_path))
    assert float(model.a.detach()[::1024].sum()) == 16 << 10
    assert anonymous_kb() - before < 8 << 10
    assert "model.safetensors" in Path("/proc/self/maps").read_text()


def test_a_failure_in_a_helper_thread_is_raised_here() -> None:
    def do(job: Any) -> int:
        if job == 5:
            raise ZeroDivisionError("five")
        return 1

    with pytest.raises(ZeroDivisionError, match="five"):
        workers.run_all(iter(range(1000)), do, threads=3, watch=None)  # type: ignore[arg-type]
    done: list[int] = []
    workers.run_all(iter(range(100)), lambda job: 1, threads=3, watch=done.append)  # type: ignore[arg-type]
    assert sum(done) == 100


@given(st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=3), st.sampled_from([*FLOATS, torch.bool])), max_size=9))
def test_arena_tensors_are_apart_and_aligned(wanted: list) -> None:
    tensors = arena.allocate([(tuple(shape), dtype) for shape, dtype in wanted])
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, wanted, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (tuple(shape), dtype, True)
        tensor.fill_(bool(number % 2) if dtype is torch.bool else number)
        assert tensor.numel() == 0 or tensor.data_ptr() % arena.ALIGNMENT == 0
    for number, tensor in enumerate(tensors):
        assert (tensor == (bool(number % 2) if tensor.dtype is torch.bool else number)).all()


def test_arena_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_HUGEPAGE", None)
    monkeypatch.setattr(arena, "_madvise", lambda: None)
    (tensor,) = arena.allocate([((700_000,), torch.float32)])
    tensor.fill_(3)
    arena.advise(tensor, arena.DONTNEED, inside=True)
    assert float(tensor.sum()) == 2_100_000


def test_arena_says_when_memory_is_out() -> None:
    with pytest.raises(MemoryError, match="memory in all"):
        arena.allocate([((1 << 60,), torch.float32)])


@pytest.mark.parametrize(("seconds", "small"), [(1e-4, False), (5e-3, True)])
def test_huge_pages_are_given_up_only_where_they_are_slow(
    monkeypatch: pytest.MonkeyPatch, seconds: float, small: bool
) -> None:
    clock = iter(number * seconds for number in range(10**6))
    monkeypatch.setattr(arena.time, "thread_time", lambda: next(clock))
    (tensor,) = arena.allocate([((40 * arena.HUGE,), torch.uint8)])
    populate = arena.Populator()
    for number in range(40):
        populate(tensor[number * arena.HUGE : (number + 1) * arena.HUGE])
    assert populate.small_pages == small
    assert int(tensor.fill_(1).sum()) == 40 * arena.HUGE
