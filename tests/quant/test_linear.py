"""`Linear4bit` and `Linear8bitLt`: what they compute and refuse, and where their tensors go."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import examples
from torch import nn

from loadstone import Linear4bit, Linear8bitLt
from loadstone.errors import QuantizationError
from loadstone.models.layers import Conv1D
from loadstone.quant.eight_bit import dequantize_rows, quantize_rows
from loadstone.quant.four_bit import dequantize_4bit, quantize_4bit
from loadstone.quant.packed import PackedLinear
from loadstone.quant.replace import replace_linears, skips

MAKERS: dict[str, Callable[[nn.Module], PackedLinear]] = {
    "nf4": lambda linear: Linear4bit.from_linear(linear, quant_type="nf4", compress_statistics=False),
    "nf4-double": lambda linear: Linear4bit.from_linear(linear, quant_type="nf4"),
    "fp4": lambda linear: Linear4bit.from_linear(linear, compress_statistics=False),
    "nf4-as-bf16": lambda linear: Linear4bit.from_linear(linear, quant_type="nf4", quant_storage=torch.bfloat16),
    "int8": lambda linear: Linear8bitLt.from_linear(linear),
}
KEYS = {
    "nf4": {"weight", "bias", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"},
    "nf4-double": {"weight", "bias", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
                   "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4"},
    "fp4": {"weight", "bias", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__fp4"},
    "int8": {"weight", "bias", "SCB", "weight_format"},
}  # fmt: skip
KEYS["nf4-as-bf16"] = KEYS["nf4-double"]


def plain(out: int = 24, into: int = 40, seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    torch.manual_seed(seed)
    return nn.Linear(into, out, bias=bias).to(dtype)


def in_out(linear: nn.Linear) -> Conv1D:
    """The same layer with its weight stored the other way round."""
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight.data, layer.bias.data = linear.weight.data.t().contiguous(), linear.bias.data.clone()
    return layer


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: packed codes held as floating point are no numbers, and NaN differs from itself."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(raw(one[name]), raw(other[name])) for name in one)


@pytest.mark.parametrize("kind", MAKERS)
def test_state_dict_keys_and_back(kind: str) -> None:
    layer = MAKERS[kind](plain())
    state = layer.state_dict()
    assert set(state) == KEYS[kind]
    other = MAKERS[kind](plain(seed=1))
    assert not same(other.state_dict(), state)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert same(other.state_dict(), state)
    x = torch.randn(3, 40)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_floating_point_state_dict_is_quantized(kind: str) -> None:
    linear = plain()
    layer = MAKERS[kind](plain(seed=1))
    layer.load_state_dict(linear.state_dict())
    assert same(layer.state_dict(), MAKERS[kind](linear).state_dict())


@pytest.mark.parametrize("kind", MAKERS)
def test_copies_pickles_and_moves(kind: str) -> None:
    layer = MAKERS[kind](plain())
    x = torch.randn(2, 40)
    out = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, layer.to("cpu"), layer.cpu()):
        assert torch.equal(other(x), out)
        assert same(other.state_dict(), layer.state_dict())
        assert isinstance(other.dequantize(), nn.Linear)
    assert layer.to("meta").weight.is_meta


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.float(), lambda m: m.to(torch.float16),
     lambda m: m.to("cpu", torch.bfloat16), lambda m: m.double(), lambda m: m.type(torch.float32)],
)  # fmt: skip
def test_casts_are_refused_before_anything_changes(kind: str, cast: Callable[[nn.Module], Any]) -> None:
    model = nn.ModuleList([MAKERS[kind](plain())])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"cannot be cast.*dequantize"):
        cast(model)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("kind", MAKERS)
def test_training_is_refused_and_adapters_are_named(kind: str) -> None:
    layer = MAKERS[kind](plain())
    assert not layer.weight.requires_grad
    with pytest.raises(QuantizationError, match="adapters"):
        layer.requires_grad_(True)
    layer.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.train().training


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_decoded_layer(kind: str, dtype: torch.dtype) -> None:
    layer = MAKERS[kind](plain(dtype=dtype))
    decoded = layer.dequantize()
    grads = []
    for module in (layer, decoded):
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_(True)
        out = module(x)
        assert (out.dtype, out.shape) == (dtype, (3, 24))
        out.sum().backward()
        grads.append((x.grad, module.bias.grad))
    room = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, wanted in zip(*grads, strict=True):
        assert torch.allclose(mine, wanted, rtol=room, atol=room)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]))
@examples(25)
def test_4bit_forward(out: int, into: int, compute: torch.dtype | None) -> None:
    """The product with the decoded weight, in the compute dtype, for widths where rows end inside a block too."""
    linear = plain(out, into)
    layer = Linear4bit.from_linear(linear, quant_type="nf4", compute_dtype=compute)
    packed, state = quantize_4bit(linear.weight.detach(), quant_type="nf4", double_quant=True)
    assert torch.equal(layer.weight, packed)
    x = torch.randn(2, 3, into)
    dtype = compute or torch.float32
    wanted = nn.functional.linear(x.to(dtype), dequantize_4bit(packed, state, dtype), linear.bias.to(dtype)).float()
    assert layer(x).dtype == torch.float32
    assert torch.allclose(layer(x), wanted, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5 if compute in (
        None, torch.float32) else 2e-2)  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
def test_in_out_layers_are_transposed_once(kind: str) -> None:
    linear = plain()
    turned = in_out(linear)
    layer, straight = MAKERS[kind](turned), MAKERS[kind](linear)
    assert same(layer.state_dict(), straight.state_dict())
    back = layer.dequantize()
    assert type(back) is Conv1D
    assert back.weight.shape == turned.weight.shape
    assert torch.equal(back.weight.t(), straight.dequantize().weight)
    layer.load_state_dict(in_out(plain(seed=3)).state_dict())
    assert same(layer.state_dict(), MAKERS[kind](plain(seed=3)).state_dict())


def test_dequantize_decodes_the_codes() -> None:
    linear = plain(dtype=torch.bfloat16)
    four = Linear4bit.from_linear(linear, quant_type="nf4").dequantize()
    packed, state = quantize_4bit(linear.weight.detach(), quant_type="nf4", double_quant=True)
    assert torch.equal(four.weight, dequantize_4bit(packed, state))
    assert (type(four), four.weight.dtype, four.weight.requires_grad) == (nn.Linear, torch.bfloat16, True)
    eight = Linear8bitLt.from_linear(linear).dequantize(torch.float32)
    assert torch.equal(eight.weight, dequantize_rows(*quantize_rows(linear.weight.detach())))
    assert torch.equal(four.bias, linear.bias)
    assert four.bias.data_ptr() != linear.bias.data_ptr()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_built_directly_it_is_zeros_of_the_right_sizes(kind: str, device: str) -> None:
    wanted = MAKERS[kind](plain())
    if kind == "int8":
        layer: Any = Linear8bitLt(40, 24, device=device)
    else:
        layer = Linear4bit(40, 24, quant_type=kind[:3], compress_statistics=kind in ("nf4-double", "nf4-as-bf16"),
                           quant_storage=wanted.weight.dtype, device=device)  # fmt: skip
    state = wanted.state_dict()
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert "quant_state" in name or tensor.shape == state[name].shape
        assert tensor.device.type == device
    if device == "cpu":
        assert not layer(torch.randn(2, 40)).any()
        layer.load_state_dict(state)
        assert same(layer.state_dict(), state)
    else:
        with pytest.raises(RuntimeError, match="on meta"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("kind", MAKERS)
def test_state_dicts_that_do_not_fit_change_nothing(kind: str) -> None:
    layer = MAKERS[kind](plain())
    before = copy.deepcopy(layer.state_dict())
    for name in before:
        less = {key: tensor for key, tensor in before.items() if key != name}
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict(less)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**before, "extra": torch.zeros(1)})
    for name in before:
        if name != "bias":
            with pytest.raises(RuntimeError, match="Error"):
                layer.load_state_dict({**before, name: torch.zeros(7, 3)})
    for wrong in (plain(24, 41), plain(40, 24)):
        with pytest.raises(RuntimeError, match="Error"):
            layer.load_state_dict(wrong.state_dict())
    without_bias = {key: tensor for key, tensor in before.items() if key != "bias"}
    assert same({k: v for k, v in layer.state_dict().items() if k != "bias"}, without_bias)


def test_options_that_are_wrong() -> None:
    with pytest.raises(QuantizationError, match="nf5"):
        Linear4bit(4, 4, quant_type="nf5")
    with pytest.raises(QuantizationError, match="uint8"):
        Linear4bit(3, 3, quant_storage=torch.float32)
    with pytest.raises(QuantizationError, match="8 bits"):
        Linear8bitLt(4, 4, has_fp16_weights=True)
    linear = plain()
    linear.weight.data[3, 3] = float("inf")
    with pytest.raises(QuantizationError, match="infinities"):
        Linear4bit.from_linear(linear)


@pytest.mark.parametrize(
    ("entry", "name", "covered"),
    [
        ("lm_head", "lm_head", True),
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("model.layers.*", "model.layers.11.mlp.up_proj", True),
        ("model.layers.*.mlp", "model.layers.11.mlp.up_proj", True),
        ("model.layers.*.mlp", "model.layers.11.mlpx.up_proj", False),
        ("mlp", "model.layers.0.mlp.up_proj", False),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("modelxlayers", "model.layers", False),
    ],
)
def test_names_to_skip(entry: str, name: str, covered: bool) -> None:
    assert skips(entry, name) == covered


@pytest.mark.parametrize("entry", ["(a+)+$", "a|b", "", "*" * 5, "[0-9]", "layers.\\d"])
def test_regular_expressions_are_not_run(entry: str) -> None:
    with pytest.raises(QuantizationError, match="regular expressions"):
        skips(entry, "a" * 50)


def test_what_is_replaced() -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    class Renamed(nn.Linear):
        pass

    shared, turned = nn.Linear(4, 4), Conv1D(4, 4)
    nn.init.normal_(turned.weight)  # made without values, which the architecture draws
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "own": Own(4, 4), "renamed": Renamed(4, 4), "one": shared,
                           "two": shared, "turned": turned, "kept": nn.Linear(4, 4), "no": nn.Linear(4, 4),
                           "norm": nn.LayerNorm(4)})  # fmt: skip
    asked = []

    def convert(name: str, layer: nn.Module) -> PackedLinear | None:
        asked.append(name)
        return None if name == "no" else Linear8bitLt.from_linear(layer)

    assert replace_linears(model, convert, ["kept"]) == ["a", "renamed", "turned"]
    assert asked == ["a", "renamed", "turned", "no"]
    assert type(model["renamed"].dequantize()) is Renamed  # type: ignore[operator]
    with pytest.raises(QuantizationError, match="no linear layer"):
        replace_linears(nn.ModuleList([nn.LayerNorm(3)]), convert)
    with pytest.raises(QuantizationError, match=r"left out: a"):
        replace_linears(nn.ModuleDict({"a": nn.Linear(2, 2)}), convert, ["a"])
