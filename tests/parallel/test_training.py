"""FSDP2, tensor parallelism and both train as one process does: losses, gradients and weights, over ten steps."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import steps
from parallel.steps import Case

TOLERANCE = 2e-5  # of fp32 losses, and of gradients and weights, which are of about 1


@cache
def alone(place: Path, count: int, dtype: str | None) -> dict[str, Any]:
    return steps.alone(place, count, **({} if dtype is None else {"dtype": dtype}))


def differences(case: Case, told: list[dict[str, Any]], tolerance: float = TOLERANCE) -> list[str]:
    """What is not as one process has it."""
    expected, wrong = alone(case.place, case.steps, case.options.get("dtype")), []
    losses = torch.tensor([rank["losses"] for rank in told]).mean(0)
    for name, found in (("losses", losses), *(("norms", torch.tensor(rank["norms"])) for rank in told)):
        if not torch.allclose(found, torch.tensor(expected[name]), atol=tolerance, rtol=tolerance):
            wrong.append(f"{case} {name}: {found.tolist()} is not {expected[name]}")
    for rank in told:
        for what in ("gradients", "weights"):
            assert rank[what].keys() == expected[what].keys()
            for name, value in expected[what].items():
                if not torch.allclose(rank[what][name], value, atol=tolerance, rtol=tolerance):
                    error = float((rank[what][name].float() - value.float()).abs().max())
                    wrong.append(f"{case} {what} of {name}: off by {error}")
    return wrong


def compared(trained: dict[str, Any]) -> list[str]:
    return [line for case, told in trained.values() if not case.options for line in differences(case, told)]


def test_two_ranks_train_as_one(on_two: dict[str, Any]) -> None:
    """All architectures, tied heads, key heads in parts, recomputed activations, and what four ranks have saved."""
    assert len(on_two) == 26
    assert not compared(on_two)


def test_four_ranks_train_as_one(on_four: dict[str, Any]) -> None:
    assert len(on_four) == 11
    assert not compared(on_four)


def test_loaded_weights_are_those_of_the_files_bit_for_bit(on_two: dict[str, Any], on_four: dict[str, Any]) -> None:
    for case, told in (*on_two.values(), *on_four.values()):
        expected = alone(case.place, case.steps, case.options.get("dtype"))["before"]
        for rank in told:
            assert rank["before"].keys() == expected.keys()
            assert all(torch.equal(rank["before"][name], value) for name, value in expected.items()), str(case)


def test_lower_precision_trains_alike_within_its_rounding(on_two: dict[str, Any]) -> None:
    (case, told) = next(pair for pair in on_two.values() if pair[0].options)
    assert told[0]["dtype"] == torch.bfloat16
    expected = alone(case.place, case.steps, "bfloat16")
    assert torch.allclose(torch.tensor(told[0]["losses"]), torch.tensor(expected["losses"]), rtol=2e-2)


@pytest.mark.parametrize("strategy", ["fsdp", "tp"])
def test_each_rank_reads_and_holds_its_share(strategy: str, on_two: dict[str, Any], on_four: dict[str, Any]) -> None:
    """Counted in bytes: half or a quarter, but for the small weights that tensor parallelism keeps whole."""
    for trained, count in ((on_two, 2), (on_four, 4)):
        for case, told in trained.values():
            if case.strategy != strategy or case.options or case.place.name not in ("llama", "mistral", "gpt2"):
                continue
            all_bytes = sum(weight.nbytes for weight in alone(case.place, case.steps, None)["weights"].values())
            whole = 0.0 if strategy == "fsdp" else 0.14 if case.kind == "gpt2" else 0.02
            for rank in told:
                assert rank["held"] <= all_bytes * (1 / count + whole)
                assert rank["read"] == rank["held"]
            if strategy == "fsdp":
                assert sum(rank["held"] for rank in told) == all_bytes
