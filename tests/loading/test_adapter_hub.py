"""Adapters from the Hub: the base they name, at the revision they name, and no place on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loadstone import AutoModelForCausalLM, LoraConfig
from loadstone.errors import RepoIdError

IDS = torch.arange(1, 9).view(1, 8)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def adapter(directory: Path, base: Any, **fields: Any) -> dict[str, bytes]:
    base.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False))
    base.save_adapter(directory)
    found = files(directory)
    values = json.loads(found["adapter_config.json"])
    found["adapter_config.json"] = json.dumps({**values, **fields}).encode()
    return found


def test_the_base_is_loaded_at_the_revision_that_the_adapter_names(hub: Any, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "old", "llama", seed=1)
    tiny.checkpoint(tmp_path / "new", "llama", seed=2)
    repo = hub.repo("org/base", files(tmp_path / "old"))
    repo.commit(files(tmp_path / "old"), "v1")
    repo.commit(files(tmp_path / "new"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    on_hub = adapter(tmp_path / "adapter", model, base_model_name_or_path="org/base", revision="v1")
    hub.repo("org/adapter", on_hub)
    loaded = AutoModelForCausalLM.from_pretrained("org/adapter")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.name_or_path == "org/base"
    by_hand = AutoModelForCausalLM.from_pretrained("org/base", revision="v1")
    by_hand.load_adapter("org/adapter", revision="main")
    assert torch.equal(by_hand(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("place", ["/etc", "../../secret", "~/models", "a/b/c", "file:///x", "org/..", "C:\\models"])
def test_an_adapter_from_the_hub_cannot_choose_a_path(hub: Any, tmp_path: Path, place: str) -> None:
    tiny.checkpoint(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    hub.repo("org/adapter", adapter(tmp_path / "adapter", model, base_model_name_or_path=place))
    with pytest.raises(RepoIdError, match="no Hub repository"):
        AutoModelForCausalLM.from_pretrained("org/adapter")


def test_a_model_on_the_hub_costs_no_request_more(hub: Any, tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "base", "llama")
    hub.repo("org/base", files(tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained("org/base")
    assert not any("adapter" in request for request in hub.take())
