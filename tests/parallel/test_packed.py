"""Quantized bases and adapters under FSDP: codes, losses, gradients and adapters are those of one process."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parallel import packed, ranks, steps
from parallel.packed import Case
from safetensors.torch import load_file, save_file

from loadstone import AutoModelForCausalLM

TOLERANCE = 2e-5  # of losses, and of gradients and weights, which are of about 1


@cache
def alone(case: Case) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank
    try:
        return packed.adapted(case)
    finally:
        torch.set_num_threads(threads)


def same_files(one: Path, other: Path) -> bool:
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    return files == {path.name: path.read_bytes() for path in other.iterdir()}


@pytest.fixture(scope="module")
def four(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, list[Any]]]:
    saved = tmp_path_factory.mktemp("adapted")
    shape: dict[str, Any] = {"sizes": (4,)}
    cases = [
        Case(places["llama"], "double", **shape, used_before=True, save_to=saved / "llama"),
        Case(places["gpt2"], "nf4", **shape, save_to=saved / "gpt2"),
        Case(places["mistral"], "int8", **shape, save_to=saved / "mistral"),
        Case(places["llama"], "fp4", "hsdp", (2, 2), steps=3),
    ]
    told = ranks.results(packed.trained, 4, cases)
    return [(case, [rank[number] for rank in told]) for number, case in enumerate(cases)]


@pytest.fixture(scope="module")
def two(places: dict[str, Path]) -> list[tuple[Case, list[Any]]]:
    cases = [
        *(Case(places[kind], method) for kind, method in (("llama", "nf4"), ("mistral", "double"), ("gpt2", "int8"))),
        Case(places["llama"], None),
        Case(places["gpt2"], "fp4", checkpointing=True, steps=3),
        Case(places["tied"], "int8", checkpointing=True, steps=3),
        Case(places["llama"], "nf4", few=True, used_before=True, steps=3),
    ]
    told = ranks.results(packed.trained, 2, cases)
    return [(case, [rank[number] for rank in told]) for number, case in enumerate(cases)]


def differences(case: Case, told: list[dict[str, Any]]) -> list[str]:
    expected, wrong = alone(case._replace(save_to=None)), []
    losses = torch.tensor([rank["losses"] for rank in told]).mean(0)
    if not torch.allclose(losses, torch.tensor(expected["losses"]), atol=TOLERANCE, rtol=TOLERANCE):
        wrong.append(f"{case}: losses {losses.tolist()} are not {expected['losses']}")
    for rank in told:
        for what in ("gradients", "weights"):
            assert rank[what].keys() == expected[what].keys()
            assert len(rank[what]) >= (6 if case.few else 16)
            for name, value in expected[what].items():
                if not torch.allclose(rank[what][name], value, atol=TOLERANCE, rtol=TOLERANCE):
                    wrong.append(f"{case} {what} of {name}: off by {float((rank[what][name] - value).abs().max())}")
    return wrong


def test_two_ranks_train_adapters_as_one(two: list[tuple[Case, list[Any]]]) -> None:
    assert not [line for case, told in two for line in differences(case, told)]


def test_four_ranks_train_adapters_as_one(four: list[tuple[Case, list[Any]]]) -> None:
    assert not [line for case, told in four for line in differences(case, told)]
    case, told = four[0]
    assert all(torch.equal(rank["logits"], alone(case._replace(save_to=None))["logits"]) for rank in told)


def test_each_rank_reads_and_holds_its_share(two: Any, four: Any) -> None:
    """Of the base: the numbers that its codes come from, but for the ends of blocks; codes and scales."""
    for case, told in (*two, *four):
        shards = case.sizes[-1]
        model = packed.load(case.place, case.method)
        read, held = model.load_report.bytes_total, model.get_memory_footprint()
        layers = sum(1 for name, _ in model.named_modules() if name.endswith(("proj", "c_attn", "c_fc")))
        for rank in told:
            assert rank["read"] <= read / shards + layers * 64 * 4 * (shards + 2)
            assert rank["held"] <= held / shards + layers * 8
            assert rank["packed"] <= model.load_report.bytes_packed / shards + layers * (16 * 4 + 256 * 4 + 300)
        assert sum(rank["held"] for rank in told) >= 0.6 * held * (4 if case.strategy == "hsdp" else 1) / shards


def test_one_process_loads_what_four_have_saved(four: Any, tmp_path: Path) -> None:
    """The base that was quantized there is that of one process, byte for byte; so is an adapter's form."""
    for number, (case, told) in enumerate(four):
        if case.save_to is None:
            continue
        model = packed.load(case.place, case.method)
        model.save_pretrained(tmp_path / str(number), max_shard_size="20KB")
        assert same_files(case.save_to / "base", tmp_path / str(number)), str(case)
        model.load_adapter(case.save_to / "adapter", is_trainable=True)
        found = packed.trainable(model)
        assert found.keys() == told[0]["weights"].keys()
        assert all(torch.equal(value, told[0]["weights"][name]) for name, value in found.items()), str(case)
        config = json.loads((case.save_to / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(case.place)


def test_adapters_are_gathered_layer_by_layer(two: Any, four: Any) -> None:
    """Two layers: one collective each for an adapter, none once it is gone."""
    for case, told in (*two, *four):
        for rank in told:
            assert rank["doors"] == ([2, 4, 2, 0] if case.save_to is not None else [2])


def test_a_second_adapter_is_sharded_and_taken_out_again(four: Any) -> None:
    for case, told in four:
        if case.save_to is not None:
            assert all(name.endswith("second.weight") for name in told[0]["second"])
            for rank in told:
                assert all(torch.equal(rank["second"][name], value) for name, value in told[0]["second"].items())
                assert all(torch.equal(rank["again"][name], value) for name, value in rank["weights"].items())
                assert torch.equal(rank["alike"], told[0]["alike"])


def test_two_ranks_load_what_four_have_saved(four: Any) -> None:
    saved = {case.place.name: case.save_to for case, _ in four if case.save_to is not None}
    told = ranks.results(packed.resumed, 2, saved)
    for kind, place in saved.items():
        assert same_files(place / "base", place / "base by two")
        alone = AutoModelForCausalLM.from_pretrained(place / "base")
        total = alone.load_report.bytes_total
        alone.load_adapter(place / "adapter", is_trainable=True)
        generated = alone.generate(torch.tensor([[5, 9, 2]]), max_new_tokens=5)
        for rank in told:
            assert rank[kind, "read"] <= 0.5 * total + 14 * 1400  # tables and descriptions of layers are read whole
            assert all(torch.equal(rank[kind, "adapter"][n], v) for n, v in packed.trainable(alone).items())
            assert torch.allclose(rank[kind, "logits"], alone(steps.tokens(0, 64)).logits, atol=TOLERANCE)
            assert torch.equal(rank[kind, "generated"], generated)


def test_peft_trains_as_one_process(places: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    told = ranks.results(packed.with_peft, 2, places["llama"], tmp_path)
    expected = packed.peft_alone(places["llama"], told[0]["begun"])
    assert len(told[0]["new"]) == 28
    for rank in told:
        kind, message = rank["alone"]
        assert kind == "ParallelError"
        assert "shard_new_weights" in message
        assert rank["nothing new"] == []
        for what in ("gradients", "weights"):
            for name, value in expected[what].items():
                assert torch.allclose(rank[what][name], value, atol=TOLERANCE), f"{what} of {name}"
    losses = torch.tensor([rank["losses"] for rank in told]).mean(0)
    assert torch.allclose(losses, torch.tensor(expected["losses"]), atol=TOLERANCE)
    model = packed.load(places["llama"], "nf4")
    model.load_adapter(tmp_path / "by peft", is_trainable=True)
    for name, value in packed.trainable(model).items():
        assert torch.equal(value, told[0]["weights"][f"base_model.model.{name}"])


SAYS = {
    "tp": "tensor parallelism",
    "mixed precision": "bnb_4bit_compute_dtype",
    "another method": "BitsAndBytesConfig",
    "an adapter under tp": "merge",
    "an adapter's directory under tp": "merge",
    "dequantize": "one process",
    "merge": "save_adapter",
    "no mesh": "device_mesh",
}
ON_ONE = {
    "NaN in one share": (1, "QuantizationError"),
    "a damaged adapter": (1, "FormatError"),
    "another configuration": (1, "ConfigError"),
    "saving to a file": (0, "PathError"),
}


def test_what_cannot_be_is_an_error_on_all_ranks(places: dict[str, Path], tmp_path: Path) -> None:
    odd, adapter = tmp_path / "odd", tmp_path / "adapter"
    tiny.checkpoint(odd, "llama", **steps.SIZES)
    tensors = load_file(odd / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = float("nan")
    save_file(tensors, odd / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(places["llama"])
    model.add_adapter(packed.LORA)
    model.save_pretrained(adapter)
    found = ranks.results(packed.refused, 2, places["llama"], odd, adapter)
    for rank in found:
        for name, says in SAYS.items():
            kind, message = rank[name]
            assert kind == "ParallelError", f"{name}: {kind} {message}"
            assert says in message, f"{name}: {message}"
        assert rank["codes"][0] == "QuantizationError"
        assert "device mesh" in rank["codes"][1]
    for name, (where, kind) in ON_ONE.items():
        assert found[where][name][0] == kind, f"{name}: {found[where][name]}"
        told, message = found[1 - where][name]
        assert told == "ParallelError", f"{name}: {told} {message}"
        assert f"rank {where} failed" in message
    assert found[0]["afterwards"] == found[1]["afterwards"]
    assert found[0]["afterwards"][0] == ""
