"""AWQ checkpoints: decoded exactly, used, written back, and refused where they are wrong."""

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

import loadstone
from loadstone.errors import FormatError, MissingWeightsError, QuantizationError, ShapeMismatchError
from loadstone.quant.awq import AwqConfig, AwqLinear


def config(**values: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True, **values}


def write(directory: Path, kind: str = "llama", **values: Any) -> dict[str, torch.Tensor]:
    settings = config(**values)
    return packed_files.checkpoint(
        directory,
        kind,
        settings,
        lambda shape, seed: packed_files.awq(shape, group_size=settings["group_size"], seed=seed),
    )


def load(directory: Path, **options: Any) -> Any:
    return loadstone.AutoModelForCausalLM.from_pretrained(directory, **options)


@tiny.examples(25)
@given(
    out=st.integers(1, 9),
    groups=st.integers(1, 4),
    group=st.sampled_from((-1, 8, 24, 32)),
    seed=st.integers(0, 999),
)
def test_layer_decodes_exactly(out: int, groups: int, group: int, seed: int) -> None:
    shape = (8 * out, 8 * (3 if group == -1 else group // 8) * groups)
    tensors, weight = packed_files.awq(shape, group_size=group, seed=seed)
    layer = AwqLinear(shape[1], shape[0], False, group_size=group)
    layer.load_state_dict(tensors)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.testing.assert_close(layer.dequantized_weight(dtype), weight.float().to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("values", [{}, {"group_size": -1}, {"version": "GEMM", "zero_point": None}], ids=str)
def test_checkpoint_decodes_exactly_and_runs(tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    weights = write(tmp_path, kind, **values)
    model = load(tmp_path, strict=True)
    assert model.quantization_method == "awq"
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).dequantized_weight(torch.float32), weight.float())
    assert not isinstance(model.lm_head, AwqLinear)
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, model.dequantize()(ids).logits, rtol=1e-5, atol=1e-5)


def test_save_writes_the_same_tensors_and_config(tmp_path: Path) -> None:
    write(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert load(tmp_path / "b").config.quantization_config == AwqConfig.from_dict(config())


def test_layer_forward_and_backward() -> None:
    tensors, weight = packed_files.awq((40, 64), group_size=16, seed=3)
    layer = AwqLinear(64, 40, True, group_size=16)
    bias = torch.randn(40)
    layer.load_state_dict({**tensors, "bias": bias})
    x = torch.randn(2, 5, 64, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out.double(), x.double() @ weight.t() + bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(2, 5, -1), rtol=1e-5, atol=1e-5)


def test_frozen_words() -> None:
    """Worked out by hand: in the word's low bits output 0, then 2, 4, 6, then 1, 3, 5, 7."""
    layer = AwqLinear(1, 8, False, group_size=-1)
    word = torch.tensor([[0x75316420]], dtype=torch.int32)
    zeros = torch.tensor([[0x11111111]], dtype=torch.int32)
    layer.load_state_dict({"qweight": word, "qzeros": zeros, "scales": torch.full((1, 8), 2.0, dtype=torch.float16)})
    assert layer.dequantized_weight().flatten().tolist() == [-2.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]


def test_modules_to_not_convert(tmp_path: Path) -> None:
    settings = config(modules_to_not_convert=["down_proj"])
    weights = write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "down_proj" in name]:
        del tensors[name]
    plain = {f"{name}.weight": weight.float() for name, weight in weights.items() if name.endswith("down_proj")}
    packed_files.write(tmp_path, "llama", settings, {**tensors, **plain})
    model = load(tmp_path, strict=True)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, plain["model.layers.1.mlp.down_proj.weight"])
    assert isinstance(model.model.layers[1].mlp.up_proj, AwqLinear)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"version": "gemv"}, "gemv"),
        ({"version": "marlin"}, "marlin"),
        ({"version": 1}, "version"),
        ({"bits": 8}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 24}, "no multiple"),
        ({"zero_point": 1}, "zero_point"),
    ],
    ids=str,
)
def test_bad_configs(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    write(tmp_path)
    packed_files.write(tmp_path, "llama", config(**values), load_file(tmp_path / "model.safetensors"))
    with pytest.raises(QuantizationError, match=says):
        load(tmp_path)


@pytest.mark.parametrize("change", [lambda t: t[1:], None, lambda t: t.float()])
@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_hostile_tensors(tmp_path: Path, suffix: str, change: Any) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{suffix}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor.to(torch.int32) if suffix == "scales" else tensor).contiguous()
        if suffix == "scales" and tensors[name].is_floating_point():
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises((FormatError, MissingWeightsError, ShapeMismatchError, QuantizationError), match="down_proj"):
        load(tmp_path)


def test_quantizing_with_it_is_refused(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    with pytest.raises(QuantizationError, match="only reads"):
        load(tmp_path, quantization_config={"quant_method": "awq"})
