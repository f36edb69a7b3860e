"""The Qwen2 of examples/custom_architecture.py on checkpoints that transformers made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from examples.script import load
from parity.peers import VOCAB, relative, tokens, transformers

from loadstone import AutoModelForCausalLM

qwen2 = load("custom_architecture")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "window", [{}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}], ids=["full", "window"]
)
def test_checkpoints_cross_both_ways(tmp_path: Path, implementation: str, tied: bool, window: dict[str, Any]) -> None:
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied, **window)
    peer = transformers.Qwen2ForCausalLM._from_config(config, attn_implementation=implementation).eval()
    tiny.randomize(peer, seed=3)
    peer.save_pretrained(tmp_path / "theirs")
    mine, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", attn_implementation=implementation, output_loading_info=True
    )
    assert type(mine) is qwen2.Qwen2ForCausalLM
    assert not any(info.values())
    ids = tokens(0, 2, 19)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for extra in ({}, {"attention_mask": mask, "position_ids": positions}):
            ours, theirs = mine(ids, **extra).logits, peer(ids, **extra).logits
            keep = mask.bool() if extra else torch.ones_like(mask).bool()
            assert relative(ours[keep], theirs[keep]) < 1e-5
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(mine.generate(ids, **options), peer.generate(ids, **options))

    mine.save_pretrained(tmp_path / "ours")
    back = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(value, back[name]) for name, value in mine.state_dict().items())
