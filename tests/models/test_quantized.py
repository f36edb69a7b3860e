"""Quantized models as users hold them: loaded, moved, counted, saved, trained or not, and taken apart again."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loadstone import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Linear4bit, Linear8bitLt
from loadstone.cli.main import main
from loadstone.errors import MissingWeightsError, QuantizationError
from loadstone.models.layers import Conv1D, Linear
from loadstone.quant import PackedLinear, find_quantizer

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
CASES = [(kind, option) for kind in tiny.KINDS for option in OPTIONS]


def load(directory: Path, option: str | None = None, **keywords: Any) -> Any:
    if option is not None:
        keywords["quantization_config"] = BitsAndBytesConfig(**OPTIONS[option])
    return AutoModelForCausalLM.from_pretrained(directory, **keywords)


def packed(model: Any) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize(("kind", "option"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_those_of_the_loaded_model_quantized_by_hand(
    tmp_path: Path, kind: str, option: str, dtype: torch.dtype
) -> None:
    tiny.checkpoint(tmp_path, kind)
    model, full = load(tmp_path, option, dtype=dtype), load(tmp_path, dtype=dtype)
    layers = packed(model)
    assert len(layers) == {"gpt2": 8}.get(kind, 14)
    assert "lm_head" not in layers
    for name, layer in layers.items():
        wanted: Any = find_quantizer("x", None, BitsAndBytesConfig(**OPTIONS[option])).convert(
            name, full.get_submodule(name)
        )
        ours, hand = layer.state_dict(), wanted.state_dict()
        assert ours.keys() == hand.keys()
        assert all(torch.equal(ours[key], hand[key]) for key in ours)
    others = {name: p for name, p in full.named_parameters() if name.rpartition(".")[0] not in layers}
    for name, parameter in others.items():
        assert model.get_parameter(name).dtype == dtype
        assert torch.equal(model.get_parameter(name), parameter)
    assert model.dtype == dtype
    assert not model.training


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_attributes_and_counts(tmp_path: Path, kind: str, option: str) -> None:
    full = tiny.checkpoint(tmp_path, kind)
    model = load(tmp_path, option)
    assert (model.is_loaded_in_4bit, model.is_loaded_in_8bit) == (option != "int8", option == "int8")
    assert (model.is_quantized, model.quantization_method) == (True, "bitsandbytes")
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
    assert (full.is_quantized, full.is_loaded_in_4bit, full.hf_quantizer) == (False, False, None)
    assert model.num_parameters() == full.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == full.num_parameters(exclude_embeddings=True)
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert model.get_memory_footprint() == sum(held.values()) < 0.7 * full.get_memory_footprint()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(f"{name}.weight" in trained for name in packed(model))
    assert model.num_parameters(only_trainable=True) == sum(model.get_parameter(name).numel() for name in trained)


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_saved_and_loaded(tmp_path: Path, kind: str, option: str) -> None:
    """Whole and in shards, tied heads included; the configuration says how, and nothing is quantized twice."""
    tiny.checkpoint(tmp_path / "full", kind)
    model = load(tmp_path / "full", option)
    for size in ("5GB", "9kB"):
        model.save_pretrained(tmp_path / "saved", max_shard_size=size)
        again = load(tmp_path / "saved", strict=True)
        assert again.load_report.bytes_quantized == 0
        assert again.config.quantization_config == BitsAndBytesConfig(**OPTIONS[option])
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight or kind != "gpt2"
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"] == BitsAndBytesConfig(**OPTIONS[option]).to_dict()
    assert AutoConfig.from_pretrained(tmp_path / "saved").quantization_config == config["quantization_config"]


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_dequantize_gives_the_full_model_back(tmp_path: Path, kind: str, option: str) -> None:
    full = tiny.checkpoint(tmp_path / "full", kind)
    model = load(tmp_path / "full", option)
    logits, names = model(IDS).logits, list(packed(model))
    plain = model.dequantize()
    assert plain is model
    assert not packed(plain)
    assert all(type(plain.get_submodule(name)) is (Conv1D if kind == "gpt2" else Linear) for name in names)
    assert (plain.is_quantized, plain.hf_quantizer, plain.quantization_method) == (False, None, None)
    apart = (plain(IDS).logits - logits).abs().max() / logits.abs().max()
    assert apart < (0.1 if option == "int8" else 1e-4)  # int8 rounds its inputs too
    plain.half().float()
    plain.requires_grad_(True)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load(tmp_path / "plain", strict=True)
    assert again.state_dict().keys() == full.state_dict().keys()
    with pytest.raises(QuantizationError, match="not quantized"):
        again.dequantize()
    assert load(tmp_path / "full", option).dequantize(torch.bfloat16).get_submodule(names[0]).weight.dtype == (
        torch.bfloat16
    )


def test_hooks_between_devices_stay_with_the_layer(tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    tiny.checkpoint(tmp_path, "llama")
    model = load(tmp_path, "nf4")
    layer = model.model.layers[0].mlp.up_proj
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hook = layer._hf_hook
    logits = model(IDS).logits
    model.dequantize()
    assert model.model.layers[0].mlp.up_proj._hf_hook is hook
    assert torch.allclose(model(IDS).logits, logits, atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.half)]
)
def test_casts_are_refused_whole(tmp_path: Path, option: str, cast: Callable[[Any], Any]) -> None:
    tiny.checkpoint(tmp_path, "llama")
    model = load(tmp_path, option, dtype=torch.float32)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    with pytest.raises(QuantizationError, match=r"cannot be cast.*dtype=.*dequantize"):
        cast(model)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
    assert model.to("cpu") is model
    assert model.cpu() is model


@pytest.mark.parametrize("option", OPTIONS)
def test_copies_and_pickles(tmp_path: Path, option: str) -> None:
    tiny.checkpoint(tmp_path, "gpt2")
    model = load(tmp_path, option)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, model(IDS).logits)
        assert (other.is_quantized, other.is_loaded_in_4bit) == (True, option != "int8")
        assert not packed(other.dequantize())


@pytest.mark.parametrize("option", OPTIONS)
def test_generates_the_same_as_its_decoded_self(tmp_path: Path, option: str) -> None:
    tiny.checkpoint(tmp_path, "mistral")
    model = load(tmp_path, option)
    out = model.generate(IDS, max_new_tokens=8, min_new_tokens=8)
    assert out.shape == (2, 14)
    if option != "int8":  # which rounds its inputs too
        assert torch.equal(model.dequantize().generate(IDS, max_new_tokens=8, min_new_tokens=8), out)


@pytest.mark.parametrize("option", OPTIONS)
def test_training(tmp_path: Path, option: str) -> None:
    """Gradients reach what is not quantized; codes are refused, and a model of which nothing could learn."""
    tiny.checkpoint(tmp_path, "llama")
    model = load(tmp_path, option).train()
    model(IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(layer.weight.grad is None for layer in packed(model).values())
    with pytest.raises(QuantizationError, match="Add adapters"):
        model.requires_grad_(True)
    with pytest.raises(QuantizationError, match="Add adapters"):
        model.model.layers[0].mlp.up_proj.requires_grad_()
    model.requires_grad_(False)
    with pytest.raises(QuantizationError, match="Add adapters"):
        model(IDS, labels=IDS)
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
    assert torch.allclose(model.eval()(IDS, labels=IDS).loss, loss)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradient_checkpointing(tmp_path: Path, option: str) -> None:
    tiny.checkpoint(tmp_path, "llama")
    model = load(tmp_path, option).train()
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
        model.gradient_checkpointing_enable()
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_skipped_modules(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")

    def names(**options: Any) -> set[str]:
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
        return set(packed(load(tmp_path, quantization_config=config)))

    default = names()
    assert len(default) == 14
    assert names(llm_int8_skip_modules=[]) == default | {"lm_head"}
    assert names(llm_int8_skip_modules=["q_proj", "model.layers.1"]) == {
        name for name in default | {"lm_head"} if "layers.1" not in name and "q_proj" not in name
    }
    with pytest.raises(QuantizationError, match="no linear layer"):
        names(llm_int8_skip_modules=["model", "lm_head"])
    everything = load(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[]))
    assert isinstance(everything.lm_head, Linear8bitLt)
    assert everything.train()(IDS, labels=IDS).loss.requires_grad


def test_tied_modules_are_never_quantized(tmp_path: Path) -> None:
    for kind in ("gpt2", "llama"):
        tiny.checkpoint(tmp_path / kind, kind, tie_word_embeddings=True)
        config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
        model = load(tmp_path / kind, quantization_config=config)
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_what_goes_to_the_cpu_can_be_left_out(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    places = {"model": "cpu", "lm_head": "cpu"}
    with pytest.raises(QuantizationError, match="no linear layer"):
        load(tmp_path, quantization_config=config, device_map=places)
    places = {"model.layers.0": "meta", "model": "meta", "lm_head": "meta", "model.layers.1.mlp": "meta"}
    assert len(packed(load(tmp_path, quantization_config=config, device_map=places))) == 14
    quantizer = find_quantizer("x", None, config)
    places = {"model.layers.0": "cpu", "model.layers.1": 0, "lm_head": torch.device("cpu")}
    assert quantizer.skipped_by_place(places) == ["model.layers.0", "lm_head"]
    off = BitsAndBytesConfig(load_in_8bit=True)
    assert find_quantizer("x", None, off).skipped_by_place({"model.layers.0": "cpu"}) == []


def test_compute_dtype_and_storage(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16",
                                bnb_4bit_quant_storage="bfloat16")  # fmt: skip
    model = load(tmp_path, quantization_config=config)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.compute_dtype, layer.weight.dtype, model.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert model(IDS).logits.dtype == torch.float32
    bytes_of = load(tmp_path, "fp4").model.layers[0].self_attn.q_proj.weight.nbytes
    assert layer.weight.nbytes == bytes_of
    assert model.num_parameters() == load(tmp_path).num_parameters()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "meta"])
def test_device_maps(tmp_path: Path, device_map: Any) -> None:
    tiny.checkpoint(tmp_path, "llama")
    model = load(tmp_path, "nf4", device_map=device_map)
    assert set(model.hf_device_map) == {""}
    assert model.model.layers[0].mlp.up_proj.weight.is_meta == (device_map == "meta")


def test_a_configuration_object_with_a_quantization(tmp_path: Path) -> None:
    """config= carries it too; from_config makes plain weights and says so."""
    tiny.checkpoint(tmp_path / "full", "llama")
    load(tmp_path / "full", "int8").save_pretrained(tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    model = load(tmp_path / "saved", config=config)
    assert model.is_loaded_in_8bit
    assert isinstance(config.quantization_config, dict)  # the caller's stays as it was


def test_from_config_is_not_quantized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.CONFIGS["llama"].from_dict(tiny.values("llama", quantization_config={"load_in_4bit": True}))
    with caplog.at_level(logging.WARNING, "loadstone.models"):
        model = AutoModelForCausalLM.from_config(config)
    assert "not quantized" in caplog.text
    assert not model.is_quantized
    model.save_pretrained(tmp_path)
    assert load(tmp_path, strict=True).load_report.fits


def test_missing_biases_are_initialised_and_codes_are_not(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.checkpoint(tmp_path, "gpt2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.0.attn.c_attn.bias"]
    save_file(tensors, file)
    model = load(tmp_path, "nf4")
    assert model.load_report.missing == ("transformer.h.0.attn.c_attn.bias",)
    assert not model.transformer.h[0].attn.c_attn.bias.any()
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file)
    with pytest.raises(MissingWeightsError, match=r"transformer.h.1.mlp.c_fc.weight"):
        load(tmp_path, "nf4")


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_inspect_shows_it(tmp_path: Path, pre_quantized: bool, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.checkpoint(tmp_path / "full", "gpt2")
    full = load(tmp_path / "full")
    asked = ["inspect", str(tmp_path / "full"), "--quantize", "nf4"]
    if pre_quantized:
        load(tmp_path / "full", "nf4").save_pretrained(tmp_path / "saved")
        asked = ["inspect", str(tmp_path / "saved")]
    assert main([*asked, "--json"]) in (0, None)
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == full.num_parameters()
    assert facts["quantization"]["bnb_4bit_quant_type"] == "nf4"
    before, after = facts["plan"]["bytes_quantized"]
    if pre_quantized:
        assert (before, after) == (0, 0)
    else:
        assert after < before / 3
    assert not facts["plan"]["missing"]
    assert not facts["plan"]["unexpected"]
    main(asked)
    text = capsys.readouterr().out
    assert "bitsandbytes, nf4" in text
    assert ("quantized, of" in text) == (not pre_quantized)


def test_names_are_public() -> None:
    import loadstone

    assert loadstone.Linear4bit is Linear4bit
    assert {"BitsAndBytesConfig", "Linear4bit", "Linear8bitLt", "register_quantizer"} <= set(loadstone.__all__)
