"""Plans: everything about a load is known, and raised, from headers alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from loadstone.errors import (
    ArgumentError,
    FormatError,
    IntegrityError,
    MissingWeightsError,
    ShapeMismatchError,
    UnexpectedWeightsError,
)
from loadstone.loading import files
from loadstone.loading.plan import Plan, make_plan


def planned(
    directory: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, **options: Any
) -> Plan:
    return make_plan(toy.meta(dtype), toy.opened(toy.save(directory, tensors, shards=2)), **options)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapping a file fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(files.Files, "raw", refuse)


def test_a_perfect_fit(tmp_path: Path) -> None:
    tensors = toy.weights()
    plan = planned(tmp_path, tensors)
    assert {move.target for move in plan.moves} == set(tensors)
    assert {move.transform for move in plan.moves} == {"map"}
    assert [*plan.missing, *plan.unexpected, *plan.mismatched, *plan.tied, *plan.compare] == []
    places = [(move.entry.file, move.entry.offset) for move in plan.moves]
    assert places == sorted(places)
    plan.check(strict=True)


def test_transforms(tmp_path: Path) -> None:
    half = planned(tmp_path / "half", toy.weights(dtype=torch.bfloat16))
    assert {(move.transform, move.dtype) for move in half.moves} == {("cast", torch.float32)}
    assert sum(move.nbytes for move in half.moves) == 2 * sum(move.entry.nbytes for move in half.moves)
    meta = planned(tmp_path / "meta", toy.weights(), device_map="meta")
    assert {move.transform for move in meta.moves} == {"none"}
    away = planned(tmp_path / "away", toy.weights(), device_map="cuda:0", devices_must_exist=False)
    assert {move.transform for move in away.moves} == {"copy"}


def test_all_mismatches_are_named_with_file_and_advice(tmp_path: Path, unread: None) -> None:
    tensors = toy.weights()
    tensors["lm_head.weight"] = torch.zeros(12, 8)
    tensors["model.layers.3.up.bias"] = torch.zeros(25)
    with pytest.raises(ShapeMismatchError) as caught:
        toy.load(toy.save(tmp_path, tensors, shards=2))
    for words in ("'lm_head.weight'", "(12, 8)", "(11, 8)", "up.bias", "(25,)", "ignore_mismatched_sizes=True"):
        assert words in str(caught.value)
    assert re.search(r"in model-0000\d-of-00002.safetensors has shape \(12, 8\)", str(caught.value))
    with pytest.raises(ShapeMismatchError):
        toy.load(tmp_path, strict=True, ignore_mismatched_sizes=True)


def test_strict(tmp_path: Path, unread: None) -> None:
    tensors = toy.weights()
    gone = ["model.layers.0.norm.bias", "model.scale"]
    for name in gone:
        del tensors[name]
    with pytest.raises(MissingWeightsError) as missing:
        toy.load(toy.save(tmp_path / "a", tensors), strict=True)
    assert all(name in str(missing.value) for name in gone)
    extra = {**toy.weights(), "x.y": torch.ones(1), "x.z": torch.ones(1)}
    with pytest.raises(UnexpectedWeightsError, match=r"'x\.y', 'x\.z'"):
        toy.load(toy.save(tmp_path / "b", extra), strict=True)


def test_what_is_ignored(tmp_path: Path) -> None:
    extra = {
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.position_ids": torch.ones(4),
        "model.layers.0.attn.bias": torch.ones(4),
        "v.other": torch.ones(1),
    }
    tensors = {**toy.weights(), **extra}
    plan = planned(tmp_path, tensors, ignore_unexpected=(r"attn\.bias",))
    assert set(plan.unexpected) == {"model.position_ids", "v.other"}  # the toy has no position_ids
    assert set(plan.ignored) == set(extra) - set(plan.unexpected)


def test_excused_weights_are_initialised_but_not_reported(tmp_path: Path) -> None:
    tensors = toy.weights()
    del tensors["model.layers.0.norm.bias"]
    plan = planned(tmp_path, tensors, ignore_missing=(r"norm\.bias$",))
    assert (plan.missing, plan.excused) == ((), ("model.layers.0.norm.bias",))
    assert plan.to_initialize == plan.excused
    plan.check(strict=True)


def test_base_model_checkpoints(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in toy.weights().items() if "lm_head" not in name}
    plan = planned(tmp_path / "bare", bare, base_model_prefix="model")
    assert plan.missing == ("lm_head.weight",)
    assert len(plan.moves) == len(bare)
    base = make_plan(toy.meta(kind=toy.Base), toy.opened(toy.save(tmp_path / "full", toy.weights())),
                     base_model_prefix="model")  # fmt: skip
    assert base.unexpected == ("lm_head.weight",)
    assert not base.missing


def test_two_tensors_for_one_weight(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="both belong"):
        planned(tmp_path, {**toy.weights(), "embed.weight": torch.ones(11, 8)}, base_model_prefix="model")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_cannot_become_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**toy.weights(), "lm_head.weight": torch.zeros(11, 8, dtype=dtype)}
    with pytest.raises(FormatError, match=r"'lm_head.weight' in model.*cannot become"):
        planned(tmp_path, tensors)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("device_map", ["disk", {"": "disk"}, {"model": "disk", "lm_head": "disk"}])
def test_buffers_lie_where_the_placement_says(tmp_path: Path, device_map: Any, offload_buffers: bool) -> None:
    """However a map is spelled: on the CPU, in memory of their own, unless they are offloaded too."""
    toy.save(tmp_path, toy.weights())
    plan = make_plan(
        toy.meta(), toy.opened(tmp_path), ties=toy.TIES, device_map=device_map, offload_buffers=offload_buffers
    )
    transforms = {move.target: move.transform for move in plan.moves}
    assert transforms.pop("model.scale") == ("disk" if offload_buffers else "map")
    assert set(transforms.values()) == {"disk"}
    for move in plan.moves:
        place = plan.placement.place_of(move.target, plan.tree.weights[move.target])
        assert (place == "disk") == (move.transform == "disk")


def test_memory(tmp_path: Path) -> None:
    tensors = toy.weights(dtype=torch.bfloat16)
    total = 2 * sum(tensor.nbytes for tensor in tensors.values())
    plan = planned(tmp_path / "a", tensors)
    assert plan.memory_by_device() == {"cpu": total + 16}
    tensors.pop("lm_head.weight")
    tied = planned(tmp_path / "b", tensors, dtype=torch.bfloat16, ties=toy.TIES)
    head = 11 * 8 * 2
    assert tied.memory_by_dtype() == {"bfloat16": total // 2 - head, "float32": 16}
    split = planned(tmp_path / "c", toy.weights(), device_map={"": "cpu", "lm_head": 1}, devices_must_exist=False)
    assert split.memory_by_device()["cuda:1"] == 2 * head + 28  # and the buffers, which stay where they are used


def test_plan_prints(tmp_path: Path) -> None:
    tensors = toy.weights(dtype=torch.bfloat16)
    for layer in range(toy.LAYERS):
        del tensors[f"model.layers.{layer}.norm.bias"]
    text = str(planned(tmp_path, {**tensors, "odd": torch.ones(1)}))
    for words in ("Toy", "2 files", "on cpu", "as float32", "to cast", "model.layers.{0-11}.norm.bias", "odd"):
        assert words in text, text


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="'nope'"):
        planned(tmp_path, toy.weights(), ties={"nope": "lm_head.weight"})
    for option in ("ignore_unexpected", "ignore_missing"):
        with pytest.raises(ArgumentError, match=option):
            planned(tmp_path, toy.weights(), **{option: ["("]})
