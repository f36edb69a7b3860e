"""int8 and int4 weight-only: how far codes are off, torch's products against decoding, files, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import loadstone
from loadstone.errors import FormatError, MissingWeightsError, QuantizationError, ShapeMismatchError
from loadstone.quant import weight_only
from loadstone.quant.int4_layout import join, layout_for, learn, split
from loadstone.quant.weight_only import (
    Int4WeightOnlyLinear,
    Int8WeightOnlyLinear,
    WeightOnlyConfig,
    quantize_int4,
    quantize_int8,
)
from loadstone.quant.wrappers import Codes, decoded

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight_of(rows: int, columns: int, dtype: torch.dtype, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(rows, 1, generator=generator))
    return (torch.randn(rows, columns, generator=generator) * 0.05 * scale).to(dtype)


@tiny.examples(60)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 90), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999),
    factor=st.sampled_from((1.0, 0.0, 1e-30, 1e4)),
)  # fmt: skip
def test_int8_is_off_by_half_a_scale(rows: int, columns: int, dtype: torch.dtype, seed: int, factor: float) -> None:
    weight = (weight_of(rows, columns, torch.float32, seed) * factor).to(dtype)
    codes, scale = quantize_int8(weight)
    off = (codes.double() * scale.double().unsqueeze(1) - weight.double()).abs()
    assert bool((off <= scale.double().unsqueeze(1) * (0.5 + 1e-4)).all())
    torch.testing.assert_close(scale, weight.float().abs().amax(1) / 127, rtol=1e-6, atol=0)


@tiny.examples(60)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    group=st.sampled_from((32, 64)),
    dtype=st.sampled_from(DTYPES),
    shift=st.sampled_from((0.0, 0.3, -2.0)),
    seed=st.integers(0, 999),
)
def test_int4_is_off_by_half_a_scale(
    rows: int, groups: int, group: int, dtype: torch.dtype, shift: float, seed: int
) -> None:
    weight = (weight_of(rows, groups * group, torch.float32, seed) + shift).to(dtype)
    weight[0, :group] = 0
    packed, pairs = quantize_int4(weight, group)
    scale, zero = pairs.double().permute(2, 1, 0).unsqueeze(3)
    decoded = (split(packed).double() - 8).view(rows, groups, group) * scale + zero
    # Scale and zero are rounded to the weight's dtype: at the ends that moves numbers by up to 16 rounding errors.
    room = 0.5 + 16 * torch.finfo(dtype).eps
    assert bool(((decoded - weight.double().view(rows, groups, group)).abs() <= scale * room).all())
    assert bool((decoded[0, 0] == 0).all())


@tiny.examples(20)
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_two_codes_in_a_byte(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(split(join(codes)), codes)
    assert int(join(codes)[0, 0]) == 16 * int(codes[0, 0]) + int(codes[0, 1])


def test_layout_of_this_cpu_is_undone_and_another_is_not_believed() -> None:
    layout = layout_for(torch.device("cpu"), 128, 96)
    assert layout is not None
    codes = torch.randint(0, 16, (128, 96), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = layout.packed(join(codes))
    assert torch.equal(layout.codes(packed), codes)
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))
    assert layout_for(torch.device("cpu"), 128 + 1, 96) is None
    assert layout_for(torch.device("meta"), 128, 96) is None

    def whole(codes: torch.Tensor) -> torch.Tensor:  # moves codes over the ends of tiles
        return join(codes.flip(0))

    assert learn(whole, 32, 1, torch.device("cpu")) is None


def layers(dtype: torch.dtype, rows: int, columns: int, group: int, seed: int = 0) -> list[Any]:
    linear = nn.Linear(columns, rows, dtype=dtype)
    linear.bias.data = weight_of(1, rows, dtype, seed + 1)[0]
    linear.weight.data = weight_of(rows, columns, dtype, seed)
    return [Int8WeightOnlyLinear.from_linear(linear), Int4WeightOnlyLinear.from_linear(linear, group_size=group)]


@tiny.examples(40)
@given(
    count=st.sampled_from((1, 3, 16, 64, 65, 257)),
    rows=st.sampled_from((8, 16, 40, 64, 128, 192)),
    group=st.sampled_from((32, 64, 128, 256)),
    groups=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_forward_and_backward_are_those_of_the_decoded_weight(
    count: int, rows: int, group: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    for layer in layers(dtype, rows, group * groups, group, seed):
        x = torch.randn(2, count, group * groups, dtype=dtype)[:1].requires_grad_(True)
        out = layer(x)
        out.sum().backward()
        weight = layer.dequantized_weight(torch.float32).double()
        bias = layer.bias.detach().double()
        size = (x.detach().double().abs() @ weight.abs().t() + bias.abs()) * torch.finfo(dtype).eps
        assert bool(((out.double() - x.double() @ weight.t() - bias).abs() <= 3 * size).all())
        assert out.dtype == dtype
        slack = weight.abs().sum(0) * torch.finfo(dtype).eps * 3 + 1e-9
        assert bool(((x.grad.double() - weight.sum(0)).abs() <= slack).all())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torchs_product_is_what_runs_for_few_bfloat16_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers(torch.bfloat16, 128, 128, 64)[kind == "int4"]
    monkeypatch.setattr(type(layer), "decode", lambda *_: pytest.fail("decoded"))
    layer(torch.randn(16, 128, dtype=torch.bfloat16))
    with pytest.raises(pytest.fail.Exception):
        layer(torch.randn(257, 128, dtype=torch.bfloat16))
    with pytest.raises(pytest.fail.Exception):
        layer(torch.randn(1, 128))


def test_without_torchs_packing_codes_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = layers(torch.bfloat16, 128, 128, 64)[1]
    monkeypatch.setattr(weight_only, "layout_for", lambda *_: None)
    plain = layers(torch.bfloat16, 128, 128, 64)[1]
    monkeypatch.undo()
    assert tiled.tiled
    assert not plain.tiled
    assert torch.equal(tiled.dequantized_weight(), plain.dequantized_weight())
    assert torch.equal(tiled.state_dict()["weight"], plain.weight)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    torch.testing.assert_close(tiled(x), plain(x), rtol=2e-2, atol=2e-2)


def test_copies_pickles_and_moves_keep_the_weight() -> None:
    layer = layers(torch.bfloat16, 128, 128, 64)[1]
    weight = layer.dequantized_weight()
    assert torch.equal(copy.deepcopy(layer).dequantized_weight(), weight)
    stored = pickle.dumps(layer)
    assert torch.equal(pickle.loads(stored).dequantized_weight(), weight)
    assert layer.tiled
    assert torch.equal(layer.to("cpu").dequantized_weight(), weight)
    assert not copy.deepcopy(layer).to("meta").tiled
    with pytest.raises(QuantizationError, match="cast"):
        layer.to(torch.float32)


def test_codes_kept_while_the_weight_is_another_come_back() -> None:
    """What merging an adapter and unmerging it does."""
    for layer in layers(torch.bfloat16, 128, 128, 64):
        weight, codes = layer.dequantized_weight(), Codes(layer)
        with decoded(layer) as matrix:
            matrix.add_(1.0)
        assert float((layer.dequantized_weight() - weight).min()) > 0.5
        codes.restore(layer)
        assert torch.equal(layer.dequantized_weight(), weight)


def load(directory: Path, **options: Any) -> Any:
    return loadstone.AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("config", [WeightOnlyConfig(8), WeightOnlyConfig(4, group_size=32)], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_while_loading_save_and_load(tmp_path: Path, kind: str, config: Any, dtype: str) -> None:
    sizes = (
        {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    )
    plain = tiny.checkpoint(tmp_path / "full", kind, **sizes)
    model = load(tmp_path / "full", quantization_config=config, dtype=dtype)
    assert model.quantization_method == "weight_only"
    assert model.load_report.bytes_quantized > 0
    full = plain.to(model.dtype).state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, weight_only.WeightOnlyLinear):
            weight = full[f"{name}.weight"].float()
            off = layer.dequantized_weight(torch.float32) - (weight.t() if layer.transposed else weight)
            assert float(off.abs().max()) < (0.6 / 127 if config.bits == 8 else 1.2 / 15) * float(weight.abs().max())
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", strict=True)
    assert again.config.quantization_config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)
        torch.testing.assert_close(
            again.dequantize()(ids).logits,
            logits,
            rtol=0,
            atol=(1e-4 if dtype == "float32" else 0.05) * float(logits.abs().max()),
        )


def test_files_do_not_depend_on_the_processor(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "full", "llama", hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    config = WeightOnlyConfig(4, group_size=32)
    model = load(tmp_path / "full", quantization_config=config, dtype="bfloat16")
    layer = model.model.layers[0].mlp.down_proj
    assert layer.tiled
    model.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    full = load_file(tmp_path / "full" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(stored, quantize_int4(full.to(torch.bfloat16), 32)[0])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": "8"}, "bits"),
        ({"bits": 8, "group_size": 32}, "group_size"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "group_size": 48}, "group_size"),
        ({"bits": 4, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"bits": 4, "groupsize": 32}, "did you mean 'group_size'"),
    ],
    ids=str,
)
def test_bad_configs(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    tiny.checkpoint(tmp_path, "llama")
    with pytest.raises(QuantizationError, match=says):
        load(tmp_path, quantization_config={"quant_method": "weight_only", **values})


def test_inputs_that_fill_no_group(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")  # down_proj has 48
    with pytest.raises(QuantizationError, match=r"down_proj has 48 inputs"):
        load(tmp_path, quantization_config=WeightOnlyConfig(4, group_size=32))
    model = load(
        tmp_path,
        quantization_config=WeightOnlyConfig(4, group_size=32, modules_to_not_convert=["down_proj", "lm_head"]),
    )
    assert type(model.model.layers[0].mlp.up_proj) is Int4WeightOnlyLinear


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_numbers_without_a_code(tmp_path: Path, bits: int, bad: float) -> None:
    tiny.checkpoint(tmp_path, "llama", intermediate_size=64)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    config = WeightOnlyConfig(bits, group_size=32 if bits == 4 else None)
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.up_proj.*infinities"):
        load(tmp_path, quantization_config=config)


@pytest.mark.parametrize(
    ("suffix", "change", "error"),
    [
        ("weight", lambda t: t[1:], ShapeMismatchError),
        ("weight", lambda t: t.view(torch.int8), FormatError),
        ("weight", None, MissingWeightsError),
        ("scale_and_zero", lambda t: t[:1, :, :1], ShapeMismatchError),
        ("scale_and_zero", None, MissingWeightsError),
        ("scale_and_zero", lambda t: t.int(), FormatError),
        ("scale_and_zero", lambda t: t.to(torch.float8_e5m2), QuantizationError),
    ],
)
def test_hostile_tensors(tmp_path: Path, suffix: str, change: Any, error: type[Exception]) -> None:
    tiny.checkpoint(tmp_path / "full", "llama", intermediate_size=64)
    config = WeightOnlyConfig(4, group_size=32)
    load(tmp_path / "full", quantization_config=config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{suffix}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(error, match="down_proj"):
        load(tmp_path)
