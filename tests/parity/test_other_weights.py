"""Pickles, state dicts and converted checkpoints: what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loadstone import AutoModelForCausalLM, convert_checkpoint

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def same(ours: Any, theirs: Any) -> None:
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, tensor in state.items():
        assert ours.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(ours.state_dict()[name], tensor), name
    if ours.dtype == torch.float32:  # in bfloat16 GPT-2's sums are rounded in another order
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pickles_and_what_is_converted_of_them(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source, target = tmp_path / "src", tmp_path / "dst"
    model = tiny.checkpoint(source, kind, tie_word_embeddings=kind == "llama")
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    ours = AutoModelForCausalLM.from_pretrained(source, use_safetensors=False, **options)
    same(ours, transformers.AutoModelForCausalLM.from_pretrained(source, use_safetensors=False, **options))
    convert_checkpoint(source, target, max_shard_size="40KB")
    same(ours, transformers.AutoModelForCausalLM.from_pretrained(target, **options))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_state_dicts_and_whose_memory_they_are(tmp_path: Path, kind: str) -> None:
    model = tiny.checkpoint(tmp_path, kind)
    state = model.state_dict()
    theirs_config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    theirs_class = transformers.AutoModelForCausalLM.from_config(theirs_config).__class__
    theirs = theirs_class.from_pretrained(None, config=theirs_config, state_dict=dict(state))
    ours = AutoModelForCausalLM.from_pretrained(
        None, config=model.config, state_dict=state, attn_implementation="eager"
    )
    same(ours, theirs)
    name = list(state)[-2]
    for one in (ours, theirs):
        assert one.state_dict()[name].data_ptr() == state[name].data_ptr(), name
