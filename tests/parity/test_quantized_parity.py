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


def int8_pair(dtype: torch.dtype, threshold: float = 6.0) -> tuple[Any, Any]:
    """(our layer, the peer's), (..., 96) to (..., 40), of the same weight and bias, in evaluation mode."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40).to(dtype)
    peer = bitsandbytes.nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=threshold)
    peer.load_state_dict(linear.state_dict())
    return Linear8bitLt.from_linear(linear, threshold=threshold).eval(), peer.to("cpu").eval()


# Written into inputs of magnitudes up to 3: (rows, columns, value) each. The threshold is 6.
OUTLIERS: dict[str, list[tuple[Any, Any, float]]] = {
    "at the threshold": [(2, 5, 6.0), (3, 6, -6.0)],
    "one step of fp16 below": [(2, 5, 5.99609375), (3, 6, -5.99609375)],
    "rounded to the threshold by fp16": [(2, 5, 5.999)],
    "a column": [(slice(None), 7, 50.0)],
    "a row, so all columns": [(1, slice(None), -40.0)],
    "several of a row": [(4, slice(0, 96, 9), 11.3)],
    "beyond fp16": [(0, 3, 1e5), (5, 4, -3e6)],
    "a row of zeros beside them": [(2, slice(None), 0.0), (3, 8, 9.0)],
    "nothing but outliers": [(slice(None), slice(None), 0.0), (slice(None), 9, 100.0)],
}


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("case", OUTLIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_outliers(dtype: torch.dtype, case: str, rows: int) -> None:
    """Bit for bit, where magnitudes meet the threshold, just miss it, or are beyond fp16."""
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)
    for row, column, value in OUTLIERS[case]:
        x[row, column] = value
    x = x[-rows:] if rows == 7 else x[OUTLIERS[case][-1][0]].reshape(-1, 96)[:1]  # or a row that has the last of them
    x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    mine, peer = int8_pair(dtype)
    with torch.no_grad():
        assert torch.equal(mine(x.view(1, -1, 96)), peer(x.view(1, -1, 96)))
        assert torch.equal(mine(x), peer(x))
    if not case.startswith("one step"):
        assert peer.state.idx.numel() > 0
    elif dtype != torch.bfloat16:  # which rounds it to 6
        assert peer.state.idx.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_products_are_too_large_by_what_the_peers_are(dtype: torch.dtype) -> None:
    """Codes and scales of these are exact, so the product of float64 is 1. The peer's factor on a CPU, 6.200124e-05 for
    1 / 127^2 = 6.2000124e-05, lacks a zero (on CUDA it does not); ours is the same. 16 bits round it away."""
    linear = torch.nn.Linear(16, 16, bias=False)
    linear.weight.data = torch.eye(16)
    peer = bitsandbytes.nn.Linear8bitLt(16, 16, bias=False, has_fp16_weights=False, threshold=6.0)
    peer.load_state_dict(linear.state_dict())
    with torch.no_grad():
        for layer in (Linear8bitLt.from_linear(linear).eval(), peer.to("cpu").eval()):
            off = layer(torch.ones(3, 16, dtype=dtype)).double() - 1
            assert torch.equal(off, off[:1, :1].expand(3, 16))
            assert abs(float(off[0, 0]) - (1.8e-5 if dtype == torch.float32 else 0.0)) <= 1e-7


def test_the_mode_does_not_change_an_int8_layer() -> None:
    """In training mode the peer multiplies unrounded inputs by the decoded weight, on a CPU alone; ours does not."""
    mine, peer = int8_pair(torch.float32)
    x = 2 * torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        evaluated = mine(x), peer(x)
        trained = mine.train()(x), peer.train()(x)
        decoded = torch.nn.functional.linear(x, mine.dequantized_weight(torch.float32), mine.bias)
    assert torch.equal(evaluated[0], evaluated[1])
    assert torch.equal(trained[0], evaluated[0])
    assert peers.relative(trained[1], decoded) <= 1e-6
    assert 1e-4 <= peers.relative(trained[0], trained[1]) <= 2e-2


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
