"""What cannot be spread over a mesh is an error on all ranks before anything is read, and nobody waits."""

from __future__ import annotations

from typing import Any

import pytest
from parallel import ranks, refusals

SAYS = {
    "device_map": "device_map",
    "no mesh": "device_mesh",
    "not a mesh": "init_device_mesh",
    "unknown dimension": "did you mean 'tp'",
    "two of one meaning": "dp, fsdp",
    "no names": "mesh_dim_names",
    "order": "'tp' must be the last",
    "nothing sharded": "'fsdp'",
    "unused dimension": "every dimension must be used",
    "unknown strategy": "did you mean 'tp'",
    "heads": "num_attention_heads=1",
    "kv heads": "num_key_value_heads=1",
    "intermediate": "gate_proj.weight",
    "vocabulary": "embed_tokens.weight",
    "style": "'columns'",
    "pattern": "names no module",
    "module": "RMSNorm",
    "tied apart": "one weight",
    "tied values": "tie_word_embeddings=False",
    "one argument differs": "do not agree about the plan",
    "one lacks the directory": "ranks 1 have no directory",
    "one has another checkpoint": "do not agree about the checkpoint",
    "no layers": "_no_split_modules",
    "no plan": "_tp_plan",
    "resize": "cannot be resized",
    "push": "save_pretrained",
}
ON_ONE = {  # the rank it happens to has the error itself, the other is told
    "one has a damaged file": (1, "FormatError"),
    "a file goes while it is read": (1, "IntegrityError"),
    "saving to a file": (0, "PathError"),
    "both lack it": (0, "NotFoundError"),  # one of a node asks the Hub for all
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks.results(refusals.seen, 2, *refusals.make(tmp_path_factory.mktemp("refusals")))


def test_refused_on_all_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for name, says in SAYS.items():
            kind, message = rank[name]
            assert kind == "ParallelError", f"{name}: {kind} {message}"
            assert says in message, f"{name}: {message}"


def test_what_happens_to_one_rank_ends_all(found: list[dict[str, Any]]) -> None:
    for name, (where, kind) in ON_ONE.items():
        assert found[where][name][0] == kind, f"{name}: {found[where][name]}"
        told, message = found[1 - where][name]
        assert told == "ParallelError", f"{name}: {told} {message}"
        assert f"rank {where} failed" in message
        assert kind in message


def test_an_odd_vocabulary_can_be_kept_whole(found: list[dict[str, Any]]) -> None:
    assert [rank["kept whole"] for rank in found] == [("", "it was loaded")] * 2


def test_the_group_is_in_order_afterwards(found: list[dict[str, Any]]) -> None:
    assert [rank["afterwards"] for rank in found] == [("", "it was loaded")] * 2
