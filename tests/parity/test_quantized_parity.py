"""Quantized models beside transformers and bitsandbytes: equal bytes, keys and logits; checkpoints cross both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity import peers

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, Linear4bit, Linear8bitLt

transformers = peers.transformers
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the peer, is not installed (extra: test)")
pytest.importorskip("accelerate", reason="accelerate, which the peer's quantization needs, is not installed")

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "nf4-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
                 "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
    "int8-plain": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}  # fmt: skip
# Largest differences of logits, relative to the largest logit: a few units of the compute dtype. Where int8 inputs are
# made of bf16 activations that differ by such a unit, some of them round the other way, to 1/127 of their row.
ROOM = {"fp32": 2e-6, "bf16": 2e-2, "bf16-int8": 6e-2}
# Multiples of 64: where rows end inside a block, the peer's decoder on the CPU takes the wrong scales.
_WIDE = {"hidden_size": 64, "intermediate_size": 128}
WIDTHS = {"llama": _WIDE, "mistral": _WIDE, "gpt2": {"n_embd": 64}}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def theirs(directory: Path, option: str | None = None, **keywords: Any) -> Any:
    if option is not None:
        keywords["quantization_config"] = transformers.BitsAndBytesConfig(**OPTIONS[option])
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **keywords)
    for module in model.modules():  # else, on some processors, it repacks weights for a kernel with scales in bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def ours(directory: Path, option: str | None = None, **keywords: Any) -> Any:
    if option is not None:
        keywords["quantization_config"] = BitsAndBytesConfig(**OPTIONS[option])
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **keywords)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: packed codes held as floating point are no numbers, and NaN differs from itself."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def same_state(mine: Any, peer: Any) -> None:
    """Equal keys, dtypes and bytes; the peer's state dict has tied weights twice, as ours."""
    ours, theirs = mine.state_dict(), peer.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(raw(tensor), raw(theirs[name])), name


def gap(mine: Any, peer: Any) -> float:
    with torch.no_grad():
        return peers.relative(mine(TOKENS).logits, peer(TOKENS).logits)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_quantized_on_load(tmp_path: Path, kind: str, dtype: torch.dtype, option: str) -> None:
    """Bytes equal; logits within the rounding of the compute dtype; then each loads what the other saved."""
    tiny.checkpoint(tmp_path / "full", kind, **WIDTHS[kind])
    mine, peer = ours(tmp_path / "full", option, dtype=dtype), theirs(tmp_path / "full", option, dtype=dtype)
    same_state(mine, peer)
    assert mine.num_parameters() == peer.num_parameters()
    mine.save_pretrained(tmp_path / "mine")
    peer.save_pretrained(tmp_path / "peer")
    mine_again, peer_again = ours(tmp_path / "peer"), theirs(tmp_path / "mine")
    same_state(mine_again, peer_again)
    same_state(mine_again, mine)
    of_bf16 = dtype == torch.bfloat16 or option == "nf4-bf16"
    kind_of_room = "fp32" if not of_bf16 else "bf16-int8" if option.startswith("int8") else "bf16"
    assert gap(mine, peer) <= ROOM[kind_of_room]
    with torch.no_grad():
        assert torch.equal(mine_again(TOKENS).logits, mine(TOKENS).logits)
        assert torch.equal(peer_again(TOKENS).logits, peer(TOKENS).logits)
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("mine", "peer")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("threshold", [0.0, 1.5, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_layers_are_equal(dtype: torch.dtype, threshold: float) -> None:
    """Bit for bit, forward and backward, outlier columns included."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64).to(dtype)
    mine = Linear8bitLt.from_linear(linear, threshold=threshold)
    peer = bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=threshold)
    peer.load_state_dict(linear.state_dict())
    peer = peer.to("cpu").eval()
    given = (2 * torch.randn(2, 5, 128)).to(dtype)
    outputs, gradients = [], []
    for layer in (mine, peer):
        x = given.clone().requires_grad_(True)
        out = layer(x)
        out.backward(torch.ones_like(out))
        outputs.append(out.detach())
        gradients.append(x.grad)
    assert torch.equal(outputs[0], outputs[1])
    assert peers.relative(gradients[0], gradients[1]) <= {torch.float32: 1e-6}.get(dtype, 1e-2)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16], ids=str)
def test_4bit_layers_are_equal(compute: torch.dtype | None, nested: bool, quant_type: str) -> None:
    """Forward and backward within the rounding of the compute dtype."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64)
    options = {"compute_dtype": compute, "compress_statistics": nested, "quant_type": quant_type}
    mine = Linear4bit.from_linear(linear, **options)
    peer = bitsandbytes.nn.Linear4bit(128, 64, **options)
    peer.load_state_dict(linear.state_dict())
    peer = peer.to("cpu")
    peer.support_avx512bf16_for_cpu = False
    outputs, gradients = [], []
    for layer in (mine, peer):
        x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        out = layer(x)
        out.backward(torch.ones_like(out))
        outputs.append(out.detach())
        gradients.append(x.grad)
    room = 1e-2 if compute == torch.bfloat16 else 1e-6
    assert peers.relative(outputs[0], outputs[1]) <= room
    assert peers.relative(gradients[0], gradients[1]) <= room
