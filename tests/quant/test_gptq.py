"""GPTQ checkpoints: decoded exactly, used, written back, and refused where they are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packed_files
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import loadstone
from loadstone.errors import MissingWeightsError, QuantizationError, ShapeMismatchError
from loadstone.quant.gptq import GPTQConfig, GPTQLinear

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
FIRST = "model.layers.0.mlp.down_proj"


def config(**values: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False, **values}


def packer(settings: dict[str, Any]) -> Any:
    form = settings.get("checkpoint_format", "gptq")
    options = {name: settings[name] for name in ("bits", "group_size", "desc_act")}
    return lambda shape, seed: packed_files.gptq(shape, **options, form=form, seed=seed)


def write(directory: Path, kind: str = "llama", **values: Any) -> dict[str, torch.Tensor]:
    settings = config(**values)
    return packed_files.checkpoint(directory, kind, settings, packer(settings), **SIZES)


def load(directory: Path, **options: Any) -> Any:
    return loadstone.AutoModelForCausalLM.from_pretrained(directory, **options)


@tiny.examples(25)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    group=st.sampled_from((-1, 1, 8, 24, 32, 128)),
    desc_act=st.booleans(),
    form=st.sampled_from(("gptq", "gptq_v2")),
    scale_dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    seed=st.integers(0, 999),
)
def test_layer_decodes_exactly(
    bits: int, shape: tuple[int, int], group: int, desc_act: bool, form: str, scale_dtype: torch.dtype, seed: int
) -> None:
    out, inputs = 32 * shape[0], 32 * shape[1]
    group = min(group, inputs)
    tensors, weight = packed_files.gptq(
        (out, inputs), bits=bits, group_size=group, desc_act=desc_act, form=form, seed=seed, scale_dtype=scale_dtype
    )
    layer = GPTQLinear(inputs, out, False, bits=bits, group_size=group, checkpoint_format=form)
    layer.scales = layer.scales.to(scale_dtype)
    layer.load_state_dict(tensors)
    # Scales of fp32 times a small number may need more than fp32 has; those of 16 bits do not.
    exact = weight.float()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.testing.assert_close(layer.dequantized_weight(dtype), exact.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"group_size": -1},
        {"desc_act": True, "checkpoint_format": "gptq_v2"},
        {"bits": 3, "group_size": 32, "desc_act": True},
        {"bits": 8, "checkpoint_format": "gptq_v2"},
        {"bits": 2},
    ],
    ids=str,
)
def test_checkpoint_decodes_exactly_and_runs(tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    weights = write(tmp_path, kind, **values)
    model = load(tmp_path, strict=True)
    assert model.quantization_method == "gptq"
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, GPTQLinear)
        assert torch.equal(layer.dequantized_weight(torch.float32), weight.float())
    assert not isinstance(model.lm_head, GPTQLinear)
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        logits = model(ids).logits
        plain = model.dequantize()
    assert not plain.is_quantized
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    write(tmp_path)
    assert load(tmp_path).load_report.bytes_copied == 0


def test_scales_keep_their_dtype_under_another_of_the_model(tmp_path: Path) -> None:
    weights = write(tmp_path)
    layer = load(tmp_path, dtype="bfloat16").get_submodule(FIRST)
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.dequantized_weight(), weights[FIRST].to(torch.bfloat16))


def test_save_writes_the_same_tensors_and_config(tmp_path: Path) -> None:
    write(tmp_path / "a", desc_act=True, damp_percent=0.01, meta={"quantizer": ["x:1"]})
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert load(tmp_path / "b").config.quantization_config.to_dict() == config(
        desc_act=True, damp_percent=0.01, meta={"quantizer": ["x:1"]}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_forward_and_backward(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadstone.quant.decoded.CHUNK", 64 * 32)  # three chunks
    tensors, weight = packed_files.gptq((96, 64), bits=4, group_size=16, desc_act=True, form="gptq", seed=3)
    layer = GPTQLinear(64, 96, True, group_size=16, dtype=dtype)
    bias = torch.randn(96).to(dtype)
    layer.load_state_dict({**tensors, "bias": bias})
    x = torch.randn(2, 5, 64, dtype=dtype, requires_grad=True)
    out = layer(x)
    (out.double() * torch.arange(96)).sum().backward()
    rounded = weight.to(dtype).double()
    expected = F.linear(x.double(), rounded, bias.double())
    room = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(out.double(), expected, **room)
    wanted = (torch.arange(96, dtype=torch.float64) @ rounded).expand(2, 5, -1)
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=2.0)
    with pytest.raises(QuantizationError, match="adapters"):
        layer.requires_grad_(True)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_of_0_in_the_first_format_comes_back(bits: int) -> None:
    """A writer subtracts one from each zero by whole words: a zero of 0 borrows from its neighbour."""
    zeros = torch.randint(0, 1 << bits, (2, 32), generator=torch.Generator().manual_seed(1))
    zeros[0, 0] = zeros[1, 5] = 0
    one = sum(1 << place for place in range(0, 32, bits))
    words = (packed_files.stream_of_bits(zeros, bits).long() - one) & 0xFFFFFFFF
    layer = GPTQLinear(32, 32, False, bits=bits, group_size=16)
    layer.qzeros = words.to(torch.int32)
    layer.scales.fill_(1.0)
    layer.g_idx = (torch.arange(32) // 16).int()
    layer.loaded()
    assert torch.equal(layer.dequantized_weight(torch.float32), -zeros.t().float().repeat_interleave(16, 1))


@pytest.mark.parametrize("group", [16, 24])
def test_g_idx_of_zeros_is_ordinary_order(group: int) -> None:
    tensors, weight = packed_files.gptq((32, 64), bits=4, group_size=group, desc_act=False, form="gptq", seed=5)
    layer = GPTQLinear(64, 32, False, group_size=group)
    layer.load_state_dict({**tensors, "g_idx": torch.zeros(64, dtype=torch.int32)})
    assert torch.equal(layer.dequantized_weight(torch.float32), weight.float())


def test_frozen_words() -> None:
    """Words worked out by hand: codes 0 to 7 of the first output, stored zeros of 7 (that is 8), scale 0.5."""
    layer = GPTQLinear(8, 8, False, group_size=-1)
    qweight = torch.zeros(1, 8, dtype=torch.int32)
    qweight[0, 0] = 0x76543210
    tensors = {
        "qweight": qweight,
        "qzeros": torch.full((1, 1), 0x77777777, dtype=torch.int32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    layer.load_state_dict(tensors)
    assert layer.dequantized_weight()[0].tolist() == [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]
    assert torch.equal(layer.dequantized_weight()[1:], torch.full((7, 8), -4.0))


def test_which_layers(tmp_path: Path) -> None:
    settings = config(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]])
    model = tiny.model("llama", **SIZES)
    tensors = dict(model.state_dict())
    for name, layer in list(model.named_modules()):
        if name.endswith(("self_attn.q_proj", "mlp.up_proj")):
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{n}": t for n, t in packer(settings)(tuple(layer.weight.shape), 1)[0].items()}
    packed_files.write(tmp_path, "llama", settings, tensors, **SIZES)
    loaded = load(tmp_path, strict=True)
    packed = {name for name, layer in loaded.named_modules() if isinstance(layer, GPTQLinear)}
    assert packed == {f"model.layers.{n}.{m}" for n in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")}


def test_quantized_head(tmp_path: Path) -> None:
    settings = config(lm_head=True)
    sizes = {**SIZES, "vocab_size": 64}
    packed_files.checkpoint(tmp_path, "llama", settings, packer(settings), **sizes)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    parts, weight = packer(settings)((64, 64), 9)
    save_file({**tensors, **{f"lm_head.{n}": t for n, t in parts.items()}}, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path, strict=True).lm_head.dequantized_weight(torch.float32), weight.float())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": None}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"group_size": 16.0}, "group_size"),
        ({"desc_act": "yes"}, "desc_act"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"is_marlin_format": True}, "marlin"),
        ({"dynamic": {"-:.*": {}}}, "dynamic"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"modules_in_block_to_quantize": [1]}, "modules_in_block_to_quantize"),
    ],
    ids=str,
)
def test_bad_configs(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed_files.write(tmp_path, "llama", config(**values), tensors, **SIZES)
    with pytest.raises(QuantizationError, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "change", "error"),
    [
        ("qweight", lambda t: t[1:], ShapeMismatchError),
        ("qzeros", lambda t: t[:, 1:], ShapeMismatchError),
        ("scales", lambda t: t[1:], ShapeMismatchError),
        ("g_idx", lambda t: t[1:], ShapeMismatchError),
        ("g_idx", lambda t: t + 1, QuantizationError),
        ("g_idx", lambda t: t - 1, QuantizationError),
        ("qweight", None, MissingWeightsError),
        ("qzeros", None, MissingWeightsError),
        ("scales", None, MissingWeightsError),
        ("g_idx", None, MissingWeightsError),
        ("qweight", lambda t: t.float(), loadstone.errors.FormatError),
        ("qweight", lambda t: t.short(), loadstone.errors.FormatError),
        ("scales", lambda t: t.double(), QuantizationError),
        ("scales", lambda t: t.int(), loadstone.errors.FormatError),
    ],
)
def test_hostile_tensors(tmp_path: Path, suffix: str, change: Any, error: type[Exception]) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{FIRST}.{suffix}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(error, match="down_proj"):
        load(tmp_path)


def test_features_that_fill_no_words(tmp_path: Path) -> None:
    write(tmp_path)
    packed_files.write(
        tmp_path, "llama", config(), load_file(tmp_path / "model.safetensors"), **SIZES | {"intermediate_size": 100}
    )
    with pytest.raises(QuantizationError, match="does not fill"):
        load(tmp_path)


def test_quantizing_with_it_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    with pytest.raises(QuantizationError, match="only reads"):
        load(tmp_path, quantization_config=GPTQConfig(bits=4))


def test_gpt2_is_refused(tmp_path: Path) -> None:
    packed_files.write(tmp_path, "gpt2", config(), dict(tiny.model("gpt2").state_dict()))
    with pytest.raises(QuantizationError, match=r"nn\.Linear only"):
        load(tmp_path)
