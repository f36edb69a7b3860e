"""What `loadstone quantize` writes, read by transformers with bitsandbytes: the codes its own loading would make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity.peers import PEER_MODELS, transformers

from loadstone.cli import main

pytest.importorskip("bitsandbytes", reason="bitsandbytes, the peer, is not installed (extra: test)")

METHODS: list[tuple[list[str], dict[str, Any]]] = [
    (["--nf4"], {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    (
        ["--fp4", "--double-quant", "--compute-dtype", "bfloat16", "--max-shard-size", "40KB"],
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
    ),
    (["--int8"], {"load_in_8bit": True}),
]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(("options", "config"), METHODS, ids=[options[0] for options, _ in METHODS])
def test_the_peer_loads_it(tmp_path: Path, kind: str, options: list[str], config: dict[str, Any]) -> None:
    sizes = (
        {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    )
    tiny.checkpoint(tmp_path / "src", kind, **sizes)
    assert main(["quantize", str(tmp_path / "src"), str(tmp_path / "dst"), *options]) == 0
    read = PEER_MODELS[kind].from_pretrained(tmp_path / "dst", dtype=torch.float32)
    assert read.is_quantized
    settings = transformers.BitsAndBytesConfig(**config)
    made = PEER_MODELS[kind].from_pretrained(tmp_path / "src", dtype=torch.float32, quantization_config=settings)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(read(ids).logits, made(ids).logits)


def test_blocks_of_another_size(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "src", "llama", hidden_size=128, intermediate_size=128, num_key_value_heads=4)
    assert main(["quantize", str(tmp_path / "src"), str(tmp_path / "dst"), "--nf4", "--blocksize", "128"]) == 0
    read = PEER_MODELS["llama"].from_pretrained(tmp_path / "dst", dtype=torch.float32)
    assert read.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == 128
    for module in read.modules():  # else, on some processors, it repacks weights, for blocks within a row only
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    mine = tiny.MODELS["llama"].from_pretrained(tmp_path / "dst")
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, mine(ids).logits, rtol=1e-4, atol=1e-4)
