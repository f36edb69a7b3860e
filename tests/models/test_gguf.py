"""``gguf_file=``: types decoded as gguf decodes them, rows and names as the Hub has them, metadata as configuration."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import gguf_files
import peak_memory
import pytest
import tiny
import torch

from loadstone import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralForCausalLM
from loadstone.errors import (
    ArgumentError,
    ConfigError,
    FormatError,
    MissingDependencyError,
    MissingWeightsError,
    NotFoundError,
    PathError,
    ShapeMismatchError,
    UnsupportedModelError,
)
from loadstone.loading import gguf as loading_gguf

pytest.importorskip("gguf", reason="the package gguf is not installed (extra: gguf)")
KINDS = (*gguf_files.QUANTIZED_BY_GGUF, *gguf_files.OTHERS)
FILE = "model.gguf"


def model_of(**overrides: Any) -> Any:
    return tiny.model("llama", **gguf_files.SIZES, **overrides)


def wanted(path: Path, config: Any) -> dict[str, torch.Tensor]:
    """The state dict that a file means: decoded by gguf, its rows put in order by hand."""
    found = {}
    names = {gguf_files.gguf_name(name): name for name in LlamaForCausalLM(config).state_dict()}
    for name, tensor in gguf_files.decoded(path).items():
        hub = names[name]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(hub.split(".")[-2])
        if heads is not None:
            half = tensor.shape[0] // heads // 2
            tensor = tensor.reshape(heads, half, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        found[hub] = tensor
    return found


def same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(tmp_path: Path, kind: str) -> None:
    model = model_of(tie_word_embeddings=True)
    path = gguf_files.save(model, tmp_path / FILE, kind)
    right = wanted(path, model.config)
    own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for dtype in (None, torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=dtype, strict=True)
        assert loaded.dtype == (dtype or own)
        for name, tensor in right.items():
            assert same_bits(loaded.state_dict()[name], tensor.to(dtype or own)), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    if kind == "F32":
        again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE)
        ids = torch.tensor([[1, 2, 3, 4]])
        held = LlamaForCausalLM.from_pretrained(None, config=again.config, state_dict=model.state_dict())
        assert torch.equal(again(ids).logits, held(ids).logits)
        assert again.load_report.bytes_mapped > 0.7 * again.load_report.bytes_total  # q and k are put in order
    if kind in gguf_files.QUANTIZED_BY_GGUF:
        off = max(
            (loaded.state_dict()[name].float() - tensor).abs().max() for name, tensor in model.state_dict().items()
        )
        assert off < {"F32": 0.01, "BF16": 0.01, "F16": 0.01, "Q8_0": 0.02}.get(kind, 0.15)


@pytest.mark.parametrize("pieces", [1, 7, 640, 5000])
def test_pieces_of_any_size(tmp_path: Path, pieces: int) -> None:
    """Blocks and rows that a piece cuts are decoded whole and cut after."""
    from loadstone.loading.files import Files
    from loadstone.loading.source import resolve_source
    from loadstone.models.gguf import gguf_weights

    model = tiny.model("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    path = gguf_files.save(model, tmp_path / FILE, "Q5_1")
    checkpoint = gguf_weights(resolve_source(tmp_path), FILE)
    right = wanted(path, model.config)
    with Files(checkpoint) as files:
        for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            entry = checkpoint.entries[name]
            count = right[name].numel()
            parts = [files.flat(entry, at, min(at + pieces, count)) for at in range(0, count, pieces)]
            assert torch.equal(torch.cat(parts).view(entry.shape), right[name])
            assert entry.offset == -1
            assert entry.values is not None
            assert torch.equal(entry.values.ready(entry, files), right[name])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_devices_and_quantization(tmp_path: Path, kind: str) -> None:
    model = model_of()
    path = gguf_files.save(model, tmp_path / FILE, kind)
    state = wanted(path, model.config)
    for method in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, quantization_config=method)
        theirs = AutoModelForCausalLM.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(tmp_path, gguf_file=FILE),
            state_dict=state,
            quantization_config=method,
        )
        codes = theirs.state_dict()
        assert ours.state_dict().keys() == codes.keys()
        assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in codes.items())
    on_meta = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, device_map="meta")
    assert on_meta.lm_head.weight.is_meta
    for place in ("auto", {"": "cpu"}, "cpu"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, device_map=place)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())
        assert loaded.hf_device_map
    unmapped = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, disable_mmap=True)
    assert all(torch.equal(unmapped.state_dict()[name], tensor) for name, tensor in state.items())
    unmapped.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", strict=True)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_configuration(tmp_path: Path) -> None:
    model = model_of(rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=777)
    tokens = {f"tokenizer.ggml.{name}_token_id": value for name, value in {"bos": 3, "eos": 4, "padding": 5}.items()}
    gguf_files.save(model, tmp_path / FILE, "Q8_0", {**tokens, "tokenizer.ggml.tokens": [f"t{n}" for n in range(61)]})
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=FILE)
    assert type(config) is LlamaConfig
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
                 "tie_word_embeddings", "attention_bias", "mlp_bias"):  # fmt: skip
        assert getattr(config, name) == getattr(model.config, name), name
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, 4, 5)
    assert config.name_or_path == str(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, gguf_file=FILE, hidden_act="gelu").hidden_act == "gelu"
    assert LlamaConfig.from_pretrained(tmp_path, gguf_file=FILE) == config
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, rms_norm_eps=0.25)
    assert loaded.config.rms_norm_eps == 0.25
    given = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, config=config)
    assert torch.equal(given.lm_head.weight, loaded.lm_head.weight)


def test_metadata_that_is_left_out_or_spelled_otherwise(tmp_path: Path) -> None:
    model = model_of(head_dim=32)
    plain = {
        "attention__head_count_kv": None,
        "rope__freq_base": None,
        "vocab_size": None,
        "rope__dimension_count": None,
    }
    multi = tiny.model("llama", **gguf_files.SIZES | {"num_key_value_heads": 4}, num_hidden_layers=1)
    gguf_files.save(multi, tmp_path / "multi.gguf", "F16", **plain)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="multi.gguf")
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size, config.rope_theta) == (4, 64, 61, 10000.0)
    assert config.dtype == torch.float16
    keys = {"attention__key_length": 32, "attention__value_length": 32, "feed_forward_length": [256, 256]}
    gguf_files.save(model, tmp_path / FILE, "Q8_0", **keys)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, strict=True)
    assert loaded.config.head_dim == 32
    assert loaded.config.intermediate_size == 256


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases(tmp_path: Path, bias: str) -> None:
    model = model_of(**{bias: True})
    path = gguf_files.save(model, tmp_path / FILE, "Q8_0", {"general.name": "Mistral of sorts"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, strict=True)
    assert type(loaded) is LlamaForCausalLM
    right = wanted(path, model.config)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in right.items())
    if bias == "attention_bias":
        name = "model.layers.0.self_attn.q_proj.bias"
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_the_mistral_family(tmp_path: Path) -> None:
    model = tiny.model("mistral", **gguf_files.SIZES)
    gguf_files.save(model, tmp_path / "window.gguf", "F32", attention__sliding_window=6)
    gguf_files.save(model, tmp_path / "name.gguf", "F32", {"general.name": "Mistral-7B-Instruct"})
    gguf_files.save(model, tmp_path / "none.gguf", "F32", {"general.name": "Minstrel"})
    ids = torch.arange(20)[None]
    windowed = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="window.gguf", attn_implementation="eager")
    assert type(windowed) is MistralForCausalLM
    assert windowed.config.sliding_window == 6
    assert torch.equal(windowed(ids).logits, model(ids).logits)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="name.gguf")
    assert type(named) is MistralForCausalLM
    assert named.config.sliding_window is None
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="none.gguf")) is LlamaForCausalLM
    assert type(MistralForCausalLM.from_pretrained(tmp_path, gguf_file="none.gguf")) is MistralForCausalLM
    assert type(LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="name.gguf")) is LlamaForCausalLM
    with pytest.raises(ConfigError, match="sliding"):
        LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="window.gguf")
    from loadstone import GPT2LMHeadModel

    with pytest.raises(ConfigError, match="GPT2Config"):
        GPT2LMHeadModel.from_pretrained(tmp_path, gguf_file="none.gguf")


def divisors(parameters: dict[str, Any], head_dim: int) -> torch.Tensor:
    """What llama.cpp's converter writes for Llama 3.1: the divisor of each frequency."""
    low = parameters["original_max_position_embeddings"] / parameters["low_freq_factor"]
    high = parameters["original_max_position_embeddings"] / parameters["high_freq_factor"]
    found = []
    for place in range(0, head_dim, 2):
        wavelength = 2 * math.pi * parameters["rope_theta"] ** (place / head_dim)
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(parameters["factor"])
        else:
            smooth = parameters["original_max_position_embeddings"] / wavelength - parameters["low_freq_factor"]
            smooth /= parameters["high_freq_factor"] - parameters["low_freq_factor"]
            found.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return torch.tensor(found, dtype=torch.float32)


ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}),
    "linear, of old": ({"rope_type": "linear", "factor": 2.5}, {"rope__scale_linear": 2.5}),
    "none": ({"rope_type": "default"}, {"rope__scaling__type": "none"}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 16},
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_scaling(tmp_path: Path, case: str) -> None:
    parameters, fields = ROPES[case]
    model = model_of(rope_parameters={"rope_theta": 20000.0, **parameters})
    gguf_files.save(model, tmp_path / FILE, "F32", **fields)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, attn_implementation="eager", strict=True)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    ids = torch.arange(50)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("changed", [False, True])
def test_frequency_bands(tmp_path: Path, changed: bool) -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    if changed:  # bands that Llama 3.1 does not have are kept as they are
        parameters |= {"low_freq_factor": 2.0, "original_max_position_embeddings": 4096}
    model = model_of(rope_parameters=parameters)
    tensors = gguf_files.tensors_of(model, "F32")
    tensors["rope_freqs.weight"] = (divisors(parameters, 64).numpy(), "F32")
    gguf_files.write(tmp_path / FILE, tensors, gguf_files.metadata(model.config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, attn_implementation="eager", strict=True)
    assert loaded.config.rope_parameters["rope_type"] == ("longrope" if changed else "llama3")
    if not changed:
        assert loaded.config.rope_parameters == model.config.rope_parameters
    ids = torch.arange(60)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    plain = model_of(rope_theta=500000.0)
    assert not torch.allclose(plain(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_shards(tmp_path: Path) -> None:
    model = model_of()
    tensors = list(gguf_files.tensors_of(model, "Q8_0").items())
    parts = [dict(tensors[at::3]) for at in range(3)]
    for number, part in enumerate(parts):
        split = {"split.no": number, "split.count": 3, "split.tensors.count": len(tensors)}
        fields = gguf_files.metadata(model.config) if number == 0 else {}
        gguf_files.write(tmp_path / f"m-{number + 1:05d}-of-00003.gguf", part, fields, general=split)
    whole = gguf_files.save(model, tmp_path / "whole.gguf", "Q8_0")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m-00001-of-00003.gguf", strict=True)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in wanted(whole, model.config).items())
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "x.gguf")
    with pytest.raises(MissingWeightsError, match="00003-of-00003"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m-00001-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").write_bytes((tmp_path / "m-00002-of-00003.gguf").read_bytes())
    with pytest.raises(FormatError, match="number 3 of 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m-00001-of-00003.gguf")
    with pytest.raises(FormatError, match="one of 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf")


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layers": ({"block_count": None}, ConfigError, "block_count"),
    "more layers than there are": ({"block_count": 3}, ConfigError, "block_count"),
    "a billion layers": ({"block_count": 1 << 30}, ConfigError, "block_count"),
    "no eps": ({"attention__layer_norm_rms_epsilon": None}, ConfigError, "epsilon"),
    "eps of infinity": ({"attention__layer_norm_rms_epsilon": math.inf}, ConfigError, "epsilon"),
    "eps of NaN": ({"attention__layer_norm_rms_epsilon": math.nan}, ConfigError, "epsilon"),
    "negative theta": ({"rope__freq_base": -1.0}, ConfigError, "freq_base"),
    "no heads": ({"attention__head_count": 0}, ConfigError, "head_count"),
    "heads that do not divide": ({"attention__head_count": 3, "rope__dimension_count": None}, ConfigError, "head"),
    "other heads": ({"attention__head_count": 8, "rope__dimension_count": 32}, Exception, "heads make|shape"),
    "heads that differ by layer": ({"attention__head_count_kv": [2, 4]}, ConfigError, "head_count_kv"),
    "a text": ({"embedding_length": "256"}, ConfigError, "embedding_length"),
    "a boolean": ({"embedding_length": True}, ConfigError, "embedding_length"),
    "a part of each head": ({"rope__dimension_count": 16, "attention__key_length": 64}, ConfigError, "part of each"),
    "other values": ({"attention__value_length": 32}, ConfigError, "value_length"),
    "experts": ({"expert_count": 8}, UnsupportedModelError, "experts"),
    "not causal": ({"attention__causal": False}, UnsupportedModelError, "causal"),
    "another layout": ({"tensor_data_layout": "odd"}, UnsupportedModelError, "layout"),
    "an unknown scaling": ({"rope__scaling__type": "spiral"}, ConfigError, "spiral"),
    "yarn without its length": ({"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, ConfigError, "original"),
    "an attention factor": ({"rope__scaling__attn_factor": 2.0}, ConfigError, "attn_factor"),
    "a vocabulary of another size": ({"vocab_size": 60}, ShapeMismatchError, "embed_tokens"),
    "another width": ({"embedding_length": 512, "rope__dimension_count": 64}, ShapeMismatchError, "shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata(tmp_path: Path, case: str) -> None:
    fields, kind, words = BAD[case]
    gguf_files.save(model_of(), tmp_path / FILE, "Q8_0", **fields)
    with pytest.raises(kind, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE)


def test_other_architectures_and_unknown_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    tensors = gguf_files.tensors_of(model, "Q8_0")
    gguf_files.write(tmp_path / "qwen.gguf", tensors, gguf_files.metadata(model.config), architecture="qwen2")
    with pytest.raises(UnsupportedModelError, match="qwen2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="qwen.gguf")
    with caplog.at_level(logging.WARNING):
        gguf_files.save(model, tmp_path / FILE, "Q8_0", logit_scale=2.0)
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE)
    assert "llama.logit_scale" in caplog.text


def test_arguments(tmp_path: Path) -> None:
    model = model_of()
    gguf_files.save(model, tmp_path / FILE, "Q8_0")
    with pytest.raises(NotFoundError, match=r"other\.gguf.*model\.gguf"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="other.gguf")
    for outside in ("../model.gguf", str(tmp_path / FILE)):
        with pytest.raises(PathError):
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=outside)
    with pytest.raises(PathError, match=r"gguf_file='model\.gguf'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / FILE)
    for other in ({"variant": "fp16"}, {"state_dict": model.state_dict()}):
        with pytest.raises(ArgumentError, match="pass one of them"):
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, **other)
    with pytest.raises(ArgumentError):
        AutoModelForCausalLM.from_pretrained(None, gguf_file=FILE)
    (tmp_path / "fake.gguf").write_bytes(b"<html>")
    with pytest.raises(FormatError, match="not a GGUF file"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="fake.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks need it, known before a weight is read; plain numbers do not."""
    model = model_of()
    gguf_files.save(model, tmp_path / FILE, "Q8_0")
    gguf_files.save(model, tmp_path / "plain.gguf", "F16")
    loading_gguf._package.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    try:
        with pytest.raises(MissingDependencyError, match=r"loadstone\[gguf\]"):
            AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE)
        AutoConfig.from_pretrained(tmp_path, gguf_file=FILE)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="plain.gguf", strict=True)
        assert torch.equal(plain.state_dict()["lm_head.weight"], model.lm_head.weight.half())
    finally:
        loading_gguf._package.cache_clear()


def test_a_type_that_this_gguf_cannot_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_files.save(model_of(), tmp_path / FILE, "Q4_K")
    import gguf.quants

    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q4_K)
    with pytest.raises(FormatError, match=r"Q4_K.*pip install -U gguf"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE)


@pytest.mark.skipif(not peak_memory.AVAILABLE, reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory(tmp_path: Path, dtype: str) -> None:
    sizes = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "vocab_size": 6144,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }
    model = tiny.model("llama", **sizes)
    gguf_files.save(model, tmp_path / "big.gguf", "Q8_0")
    gguf_files.save(model_of(), tmp_path / "small.gguf", "Q8_0")
    size = sum(p.numel() for p in model.parameters()) * getattr(torch, dtype).itemsize
    call = f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, gguf_file='{{}}.gguf', dtype={dtype!r})"
    peak = peak_memory.peak_of(
        f"model = {call.format('big')}", "from loadstone import AutoModelForCausalLM\n" + call.format("small")
    )
    assert peak < size + 48e6, f"{peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
