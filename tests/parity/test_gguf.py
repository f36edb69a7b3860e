"""GGUF files through loadstone and through transformers: the same weights bit for bit, and the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import pytest
import smollm2
import tiny
import torch

from loadstone import AutoModelForCausalLM

pytest.importorskip("gguf", reason="the package gguf is not installed (extra: gguf)")
FILE = "model.gguf"


@pytest.mark.parametrize("kind", [*gguf_files.QUANTIZED_BY_GGUF, *gguf_files.OTHERS])
def test_weights_and_logits(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny.model("llama", **gguf_files.SIZES, tie_word_embeddings=kind == "Q4_1", rope_theta=5e5)
    gguf_files.save(model, tmp_path / FILE, kind)
    for dtype in (torch.float32, torch.bfloat16):
        options: dict[str, Any] = {"gguf_file": FILE, "dtype": dtype, "attn_implementation": "eager"}
        ours = AutoModelForCausalLM.from_pretrained(tmp_path, **options, strict=True)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(ours.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, equal_nan=True)
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim", "max_position_embeddings",
                 "tie_word_embeddings", "rope_parameters"):  # fmt: skip
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    # transformers keeps the single-precision number; the shortest decimal for it computes the same
    assert torch.tensor(ours.config.rms_norm_eps).equal(torch.tensor(theirs.config.rms_norm_eps))


@pytest.mark.skipif(smollm2.why_not() is not None, reason=str(smollm2.why_not()))
def test_real_weights() -> None:
    """SmolLM2-135M-Instruct, Q4_1 and Q8_0: as the tests' own conversion by gguf's reader and decoder has it."""
    file = smollm2.gguf_file()
    assert file is not None
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, strict=True)
    converted = AutoModelForCausalLM.from_pretrained(smollm2.smollm2_directory(), strict=True)
    state = converted.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
    mine, theirs = loaded.config.to_dict(), converted.config.to_dict()
    assert {name for name in theirs if mine.get(name) != theirs[name]} <= {"architectures"}
