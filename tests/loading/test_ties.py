"""Tied weights: the four cases, and some that are rarer."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loadstone.loading.plan import make_plan

SOURCE, TARGET = "model.embed.weight", "lm_head.weight"


def tied(model: toy.Toy) -> bool:
    return model.lm_head.weight is model.model.embed.weight


@pytest.mark.parametrize("absent", [SOURCE, TARGET])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_of_both_is_there(tmp_path: Path, absent: str, dtype: torch.dtype) -> None:
    tensors = toy.weights(dtype=dtype)
    del tensors[absent]
    model, report = toy.load(toy.save(tmp_path, tensors), ties=toy.TIES, strict=True)
    kept = tensors[SOURCE if absent == TARGET else TARGET]
    assert tied(model)
    assert torch.equal(model.lm_head.weight, kept.float())
    assert report.fits
    assert report.tied == ({TARGET: SOURCE} if absent == TARGET else {SOURCE: TARGET})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_and_equal(tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    tensors = toy.weights(dtype=dtype)
    tensors[TARGET] = tensors[SOURCE].clone()
    model, report = toy.load(toy.save(tmp_path, tensors), ties=toy.TIES)
    assert tied(model)
    assert (report.fits, report.tied, caplog.records) == (True, {TARGET: SOURCE}, [])
    assert report.bytes_total == sum(tensor.nbytes for name, tensor in tensors.items() if name != TARGET)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_and_different(tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    tensors = toy.weights(dtype=dtype)
    tensors[TARGET] = tensors[SOURCE].clone()
    tensors[TARGET][-1, -1] += 1
    with caplog.at_level(logging.WARNING, "loadstone.loading"):
        model, report = toy.load(toy.save(tmp_path, tensors), ties=toy.TIES)
    assert not tied(model)
    assert toy.same(model, {name: tensor.float() for name, tensor in tensors.items()})
    assert report.tied == {}
    assert "not tied" in caplog.text
    assert TARGET in caplog.text


def test_neither(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = toy.weights()
    del tensors[SOURCE], tensors[TARGET]
    model, report = toy.load(toy.save(tmp_path, tensors), ties=toy.TIES)
    assert tied(model)
    assert set(report.missing) == {SOURCE, TARGET}
    assert torch.all(model.lm_head.weight == 0.25)
    assert SOURCE in caplog.text


def test_equal_only_once_cast(tmp_path: Path) -> None:
    tensors = toy.weights()
    tensors[SOURCE] = tensors[SOURCE].bfloat16()
    tensors[TARGET] = tensors[SOURCE].float()
    model, report = toy.load(toy.save(tmp_path, tensors), model=toy.meta(torch.bfloat16), ties=toy.TIES)
    assert tied(model)
    assert report.tied == {TARGET: SOURCE}


def test_a_tie_that_is_initialised_with_a_new_shape(tmp_path: Path) -> None:
    tensors = toy.weights()
    del tensors[TARGET]
    tensors[SOURCE] = torch.zeros(12, 8)
    model, report = toy.load(toy.save(tmp_path, tensors), ties=toy.TIES, ignore_mismatched_sizes=True)
    assert tied(model)
    assert [name for name, *_ in report.mismatched] == [SOURCE]
    assert report.missing == ()
    assert model.lm_head.weight.shape == (11, 8)


def test_training_a_tied_weight_moves_both(tmp_path: Path) -> None:
    tensors = toy.weights()
    del tensors[TARGET]
    model, _ = toy.load(toy.save(tmp_path, tensors), ties=toy.TIES)
    model.lm_head(model.model.embed(torch.tensor([1]))).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert tied(model)
    assert not torch.equal(model.model.embed.weight, tensors[SOURCE])


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2, bias=False) for _ in range(3))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True), st.booleans(), st.booleans())
def test_three_tied_weights(tmp_path: Path, there: list[str], chain: bool, equal: bool) -> None:
    tensors = {f"{name}.weight": torch.full((2, 3), 1.0 if equal else float(ord(name))) for name in there}
    ties = {"b.weight": "a.weight", "c.weight": "b.weight" if chain else "a.weight"}
    model, report = toy.load(toy.save(tmp_path, tensors), model=toy.meta(kind=Three), ties=ties)
    assert report.missing == ()
    assert len({id(parameter) for parameter in (model.a.weight, model.b.weight, model.c.weight)}) == (
        1 if equal else len(there)
    )
    for name, tensor in tensors.items():
        assert torch.equal(model.state_dict()[name], tensor)


class Shared(nn.Module):
    """Tied when built, and one module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.twin = self.a


def test_weights_shared_by_the_model_itself(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3), "b.bias": torch.zeros(3)}
    with torch.device("meta"):
        model = Shared()
    _, report = toy.load(toy.save(tmp_path, tensors), model=model, strict=True)
    assert model.a.weight is model.b.weight is model.twin.weight
    assert report.tied == {"b.weight": "a.weight", "twin.weight": "a.weight", "twin.bias": "a.bias"}


def test_a_cycle_of_ties_is_no_endless_loop(tmp_path: Path) -> None:
    checkpoint = toy.opened(toy.save(tmp_path, toy.weights()))
    plan = make_plan(toy.meta(), checkpoint, ties={SOURCE: TARGET, TARGET: SOURCE})
    assert len(plan.moves) == len(checkpoint.entries)
