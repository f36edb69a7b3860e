"""Generation on a mesh gives the tokens of one process, and no rank waits for one that is done; dropout is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parallel import moments, ranks

from loadstone import AutoModelForCausalLM


@pytest.fixture(scope="module")
def told(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    dropping = tmp_path_factory.mktemp("dropping")
    tiny.checkpoint(dropping, "gpt2", vocab_size=64)
    return ranks.results(moments.generated, 2, places, dropping)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "tied", "one key", "three keys"])
def test_tensor_parallel_tokens_are_those_of_one_process(
    kind: str, told: list[dict[str, Any]], places: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(places[kind])
    expected = model.generate(moments.PROMPTS, max_new_tokens=12)
    assert all(torch.equal(rank[kind], expected) for rank in told)
    if kind != "gpt2":
        beams = model.generate(moments.PROMPTS, max_new_tokens=6, num_beams=3)
        assert all(torch.equal(rank[f"{kind} beams"], beams) for rank in told)
        assert all(torch.equal(rank[f"{kind} static"], expected) for rank in told)


def test_drawn_tokens_are_alike_on_ranks_with_other_seeds(told: list[dict[str, Any]]) -> None:
    for kind in ("llama", "mistral", "gpt2", "tied"):
        assert torch.equal(told[0][f"{kind} drawn"], told[1][f"{kind} drawn"])


def test_sharded_ranks_generate_what_they_like(told: list[dict[str, Any]], places: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(places["llama"])
    for rank, found in enumerate(told):
        mine = moments.PROMPTS[rank : rank + 1, rank:]
        expected = model.generate(mine, max_new_tokens=3 + 6 * rank, num_beams=1 + rank)
        assert torch.equal(found["apart"], expected)
        assert torch.equal(found["together"], model.generate(moments.PROMPTS, max_new_tokens=12))
    assert torch.equal(told[0]["alone"], model.generate(moments.PROMPTS, max_new_tokens=4))
    assert told[1]["alone"] == "GenerationError"


def test_dropout_falls_alike_on_all_ranks(told: list[dict[str, Any]]) -> None:
    first, second = (rank["dropout"] for rank in told)
    assert first["losses"] == second["losses"]
    assert torch.equal(first["norm"], second["norm"])
