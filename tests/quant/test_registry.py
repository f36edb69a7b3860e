"""Methods by name: which one serves a checkpoint and its caller, and a method of the user's own from end to end."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, register_quantizer
from loadstone.errors import QuantizationError, RegistrationError
from loadstone.quant import PackedLinear, Quantizer, Recipe, find_quantizer, quantization_methods, registry

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


class SignConfig:
    """Weights as signs, with one scale for each row."""

    quant_method = "signs"

    def __init__(self, gain: float = 1.0, modules_to_not_convert: list[str] | None = None) -> None:
        self.gain, self.modules_to_not_convert = gain, modules_to_not_convert

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> SignConfig:
        unknown = set(config_dict) - {"gain", "modules_to_not_convert", "quant_method"}
        if unknown:
            raise QuantizationError(f"unknown: {unknown}")
        return cls(**{name: value for name, value in config_dict.items() if name != "quant_method"})

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": "signs", "gain": self.gain, "modules_to_not_convert": self.modules_to_not_convert}


class SignLinear(PackedLinear):
    """Signs as int8; the scale of a row is its mean magnitude."""

    checkpoint_names = {"scale": "weight.scale"}
    read_first = ("scale",)
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, gain: float, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.gain = gain
        device = options.get("device")
        signs = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(signs, requires_grad=False)
        self.register_buffer("scale", torch.zeros(out_features, device=device, dtype=torch.float32))

    def load_recipe(self, attribute: str) -> Recipe | None:
        shape, gain, turned = (self.out_features, self.in_features), self.gain, self.transposed

        def run(weight: Tensor) -> dict[str, Tensor]:
            rows = weight.t().contiguous() if turned else weight
            return {"weight": rows.sign().to(torch.int8), "scale": rows.float().abs().mean(1) * gain}

        return Recipe(shape[::-1] if turned else shape, torch.float32, ("weight", "scale"), run)

    def check_parts(self, parts: Mapping[str, Tensor]) -> None:
        if (parts["scale"] < 0).any():
            raise QuantizationError("a scale is negative")

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.weight * self.scale.unsqueeze(1)).to(dtype or self.source_dtype)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dequantized_weight(input.dtype), self.bias)


class SignQuantizer(Quantizer):
    """`SignLinear` everywhere."""

    def convert(self, name: str, layer: nn.Module) -> PackedLinear:
        weight: Any = layer.weight
        out, into = weight.shape[::-1] if hasattr(layer, "nf") else weight.shape
        packed = SignLinear(into, out, layer.bias is not None, self.config.gain, device="meta", dtype=weight.dtype)
        packed.stand_in_for(layer)
        return packed


class ReadOnlyQuantizer(SignQuantizer):
    """Only reads packed checkpoints."""

    can_quantize = False


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_method_of_ones_own_from_end_to_end(tmp_path: Path, kind: str) -> None:
    """Registered, quantizing while loading, saved, loaded packed, decoded: by the same hooks as the built-in ones."""
    register_quantizer("signs", SignConfig, SignQuantizer)
    full = tiny.checkpoint(tmp_path / "full", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=SignConfig(gain=0.5))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SignLinear)}
    assert len(layers) == (14 if kind != "gpt2" else 8)
    for name, layer in layers.items():
        wanted = full.get_submodule(name).weight.detach()
        wanted = wanted.t() if kind == "gpt2" else wanted
        assert torch.equal(layer.weight, wanted.sign().to(torch.int8))
        assert torch.equal(layer.scale, wanted.contiguous().abs().mean(1) * 0.5)
    assert (model.is_quantized, model.quantization_method, model.is_loaded_in_4bit) == (True, "signs", False)
    assert model.num_parameters() == full.num_parameters()

    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["quantization_config"] == SignConfig(gain=0.5).to_dict()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", strict=True)
    ids = torch.tensor([[1, 2, 3]])
    assert again.load_report.bytes_quantized == 0
    assert torch.equal(again(ids).logits, model(ids).logits)
    logits = again(ids).logits
    plain = again.dequantize()
    assert torch.allclose(plain(ids).logits, logits, atol=1e-5)
    assert {name: t.shape for name, t in plain.state_dict().items()} == {
        name: t.shape for name, t in full.state_dict().items()
    }


def test_its_checks_come_before_the_load(tmp_path: Path) -> None:
    register_quantizer("signs", SignConfig, SignQuantizer)
    tiny.checkpoint(tmp_path / "full", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config={"quant_method": "signs"})
    model.model.layers[1].mlp.up_proj.scale[2] = -1
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(QuantizationError, match=r"model.layers.1.mlp.up_proj.*negative"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(QuantizationError, match="unknown"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config={"quant_method": "signs", "a": 1})


def test_modules_left_out(tmp_path: Path) -> None:
    register_quantizer("signs", SignConfig, SignQuantizer)
    tiny.checkpoint(tmp_path / "full", "llama")
    config = SignConfig(modules_to_not_convert=["mlp.up_proj", "model.layers.0"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config)
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert "lm_head" in packed
    assert not any("up_proj" in name or "layers.0" in name for name in packed)
    assert len(packed) == 7


def test_registration() -> None:
    register_quantizer("signs", SignConfig, SignQuantizer)
    assert {"bitsandbytes", "signs"} <= set(quantization_methods())
    with pytest.raises(RegistrationError, match="exist_ok"):
        register_quantizer("signs", SignConfig, SignQuantizer)
    register_quantizer("signs", SignConfig, ReadOnlyQuantizer, exist_ok=True)
    assert isinstance(find_quantizer("x", {"quant_method": "signs"}, None), ReadOnlyQuantizer)
    for name, config, quantizer in (("", SignConfig, SignQuantizer), ("other", SignConfig, SignQuantizer),
                                    ("signs", dict, SignQuantizer), ("signs", SignConfig, 3)):  # fmt: skip
        with pytest.raises(RegistrationError):
            register_quantizer(name, config, quantizer, exist_ok=True)  # type: ignore[arg-type]


def test_a_method_that_only_reads(tmp_path: Path) -> None:
    register_quantizer("signs", SignConfig, ReadOnlyQuantizer)
    with pytest.raises(QuantizationError, match="only reads"):
        find_quantizer("here", None, SignConfig())
    assert find_quantizer("here", SignConfig().to_dict(), None).pre_quantized


def test_nothing_asked_is_nothing() -> None:
    assert find_quantizer("here", None, None) is None


def test_the_checkpoint_wins_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loadstone.quant"):
        found = find_quantizer("here", NF4, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"))
    assert "own quantization_config is used" in caplog.text
    assert (found.config.quantization_method(), found.pre_quantized) == ("nf4", True)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "loadstone.quant"):
        find_quantizer("here", NF4, NF4)
    assert not caplog.text


def test_two_methods_are_an_error() -> None:
    register_quantizer("signs", SignConfig, SignQuantizer)
    with pytest.raises(QuantizationError, match=r"here is quantized with 'bitsandbytes'.*'signs'"):
        find_quantizer("here", NF4, SignConfig())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "gptx", "bits": 4}, "'gptx', which is not known.*bitsandbytes"),
        ({"quant_method": "bitsandbites"}, "did you mean 'bitsandbytes'"),
        ({"quant_method": ["bitsandbytes"]}, "not known"),
        ({"quant_method": None}, "names no quant_method"),
        ({"bits": 4}, "names no quant_method"),
        ({}, "names no quant_method"),
        ({"quant_method": "bitsandbytes"}, "no bits"),
        ([], "must be a configuration"),
        ("nf4", "must be a configuration"),
        (4, "must be a configuration"),
    ],
)
def test_unknown_methods_and_wrong_types(tmp_path: Path, given: Any, message: str) -> None:
    """Of the checkpoint or of the caller: an error, never a load in full precision."""
    for of_checkpoint, of_caller in ((given, None), (None, given)):
        with pytest.raises(QuantizationError, match=message):
            find_quantizer("here", of_checkpoint, of_caller)
    tiny.checkpoint(tmp_path, "llama")
    with pytest.raises(QuantizationError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    (tmp_path / "config.json").write_text(json.dumps(tiny.values("llama", quantization_config=given)))
    with pytest.raises(QuantizationError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_another_librarys_configuration_is_taken_by_its_dictionary() -> None:
    class Method:
        value = "bitsandbytes"

    class Theirs:
        quant_method = Method()

        def to_dict(self) -> dict[str, Any]:
            return NF4

    found = find_quantizer("here", None, Theirs())
    assert type(found.config) is BitsAndBytesConfig
    assert (found.config.quantization_method(), found.bits, found.pre_quantized) == ("nf4", 4, False)
