"""A pipeline's stages train as one process does: losses, gradients and weights, under torch's schedules."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import ranks, stages, steps
from parallel.stages import Case

from loadstone import AutoModelForCausalLM

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return stages.checkpoints(tmp_path_factory.mktemp("staged"))


@cache
def alone(place: Path, count: int) -> dict[str, Any]:
    return steps.alone(place, count)


def check(case: Case, told: list[dict[str, Any]]) -> None:
    expected = alone(case.place, case.steps)
    losses = [rank["losses"] for rank in told if rank["losses"][0] is not None]
    assert len(losses) == len(told) // case.sizes[0], case  # the last stage's ranks
    close = {"atol": TOLERANCE, "rtol": TOLERANCE}
    assert torch.allclose(torch.tensor(losses).mean(0), torch.tensor(expected["losses"]), **close), str(case)
    holders: dict[str, int] = {}
    for rank in told:
        assert rank["fits"], case
        assert torch.allclose(torch.tensor(rank["norms"]), torch.tensor(expected["norms"]), **close), str(case)
        for name, value in rank["before"].items():
            assert torch.equal(value, expected["before"][name]), f"{case} {name}"
            holders[name] = holders.get(name, 0) + 1
        for what in ("gradients", "weights"):
            assert rank[what].keys() == rank["before"].keys()
            for name, value in rank[what].items():
                assert torch.allclose(value, expected[what][name], **close), f"{case} {what} {name}"
    assert holders.keys() == expected["before"].keys()
    apart = len(told) // case.sizes[0]
    for name, count in holders.items():  # every weight in one stage, but for the tied one
        twice = name.endswith(("embed_tokens.weight", "wte.weight")) and "lm_head.weight" not in holders
        assert count == apart * (1 + twice), name


def test_two_stages_train_as_one(places: dict[str, Path], tmp_path: Path) -> None:
    cases = [Case(kind, places[kind], (2,)) for kind in ("llama", "gpt2")]
    cases += [
        Case(kind, places[place], (2,), schedule="GPipe") for kind, place in (("mistral",) * 2, ("llama", "tied"))
    ]
    cases += [Case("gpt2", places["gpt2"], (2,), steps=2, layers=(1, 3), skip_logits=False)]
    cases += [Case("gpt2", places["gpt2"], (2,), steps=2, checkpointing=True)]
    cases += [Case(kind, places[place], (2,), steps=2) for kind, place in (("llama", "headed"), ("qwen2", "qwen2"))]
    told = ranks.results(stages.trained, 2, cases)
    for number, case in enumerate(cases):
        found = [rank[number] for rank in told]
        check(case, found)
        if case.place.name in ("tied", "gpt2"):  # the copies of the first and the last stage stay one, bit for bit
            name = next(name for name in found[0]["weights"] if name in found[1]["weights"])
            assert torch.equal(found[0]["weights"][name], found[1]["weights"][name])
        if case.layers is None:
            whole = sum(weight.nbytes for weight in alone(case.place, case.steps)["weights"].values())
            assert sum(rank["read"] for rank in found) <= whole * 1.15
            assert max(rank["read"] for rank in found) <= whole * 0.6


def test_four_ranks_train_as_one_and_save_what_one_saves(places: dict[str, Path], tmp_path: Path) -> None:
    """Four stages; two whose layers are sharded, or shared out."""
    cases = [Case(kind, places[kind], (4,), save_to=tmp_path / kind) for kind in ("llama", "mistral", "gpt2")]
    for kind, strategy in (("llama", "pp+fsdp"), ("tied", "pp+tp"), ("tied", "pp+fsdp"), ("gpt2", "pp+tp")):
        to = tmp_path / f"{kind}-{strategy}"
        cases.append(Case(kind, places[kind], (2, 2), strategy, "GPipe", steps=3, save_to=to))
    told = ranks.results(stages.trained, 4, cases)
    for number, case in enumerate(cases):
        found = [rank[number] for rank in told]
        check(case, found)
        assert case.save_to is not None
        model, info = AutoModelForCausalLM.from_pretrained(case.save_to, output_loading_info=True)
        assert not any(info.values())
        for rank in found:
            for name, value in rank["weights"].items():
                assert torch.equal(model.get_parameter(name), value), f"{case} {name}"
        again = tmp_path / f"{case.save_to.name}-again"
        model.save_pretrained(again, max_shard_size="20KB")
        assert {path.name for path in again.iterdir()} == {path.name for path in case.save_to.iterdir()}
        for path in again.iterdir():
            assert path.read_bytes() == (case.save_to / path.name).read_bytes(), f"{case} {path.name}"


def test_accumulation_masks_evaluation_and_torch_checkpoints(places: dict[str, Path], tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    told = ranks.results(stages.others, 2, places, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(places["tied"]).train()
    for number in range(2):
        batch = steps.tokens(number, 64)
        (model(batch, labels=batch).loss / 2).backward()
    same_gradients(model, told, "accumulated")
    model = AutoModelForCausalLM.from_pretrained(places["gpt2"]).train()
    mask, positions = stages.padding()
    batch = steps.tokens(0, 64)
    model(batch, attention_mask=mask, position_ids=positions, labels=batch).loss.backward()
    same_gradients(model, told, "masked")
    with torch.no_grad():
        logits = model.eval()(batch).logits
    assert told[0]["logits"] is None
    assert torch.allclose(told[1]["logits"], logits, atol=1e-5)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters())
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    held, state = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": held, "optimizer": state}, checkpoint_id=str(tmp_path))
    set_state_dict(model, optimizer, model_state_dict=held, optim_state_dict=state, options=options)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert optimizer.param_groups[0]["lr"] == steps.RATE
    says = {
        "generate": "cannot generate",
        "labels": "target of the schedule",
        "layers": "add up to 4",
        "order": "'pp' must be the first",
        "without pp": "device_mesh",
        "too few": "pp=2 stages",
        "apart": "do not agree about the layers per stage",
        "other mesh": "no pp dimension",
        "head": "another stage",
    }
    for rank in told:
        for name, message in rank["refused"].items():
            kind = "ArgumentError" if name == "labels" else "ParallelError"
            assert message.startswith(kind), f"{name}: {message}"
            assert says[name] in message, f"{name}: {message}"


def same_gradients(model: Any, told: list[dict[str, Any]], what: str) -> None:
    expected = steps.whole_weights(model, gradients=True)
    for rank in told:
        for name, value in rank[what].items():
            assert torch.allclose(value, expected[name], atol=TOLERANCE, rtol=TOLERANCE), f"{what} {name}"
