"""config.json that is missing, malformed or nonsense: typed errors that name it, before weights are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from loadstone import AutoConfig, AutoModelForCausalLM, MistralForCausalLM
from loadstone.errors import (
    ArgumentError,
    ConfigError,
    NotFoundError,
    QuantizationError,
    RemoteCodeRefused,
    UnsupportedModelError,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint whose weights cannot be read: what is wrong with config.json must be found first."""
    (tmp_path / "model.safetensors").write_bytes(b"unreadable")
    return tmp_path


def refused(directory: Path, content: Any, kind: type[Exception], words: str) -> None:
    """Both doors refuse this config.json."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "config.json").write_bytes(data)
    for door in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(kind) as caught:
            door.from_pretrained(directory)
        assert words in str(caught.value)


def test_no_config(directory: Path) -> None:
    for door in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(NotFoundError, match=r"no file 'config\.json'"):
            door.from_pretrained(directory)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "config.json is not valid JSON"),
        (b"{nope", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[]", "object"),
        (b"3", "object"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "twice"),
        (b'{"model_type": "llama", "rms_norm_eps": NaN}', "NaN"),
        (b'{"a":' * 100_000, "config.json"),
    ],
)
def test_malformed_files(directory: Path, content: bytes, words: str) -> None:
    refused(directory, content, ConfigError, words)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("lama", "did you mean 'llama'"), ("LLAMA", "registered: "), ("bert", "registered: "), (3, "string"),
     (["llama"], "string"), ("../llama", "registered: ")],
)  # fmt: skip
def test_model_types(directory: Path, model_type: Any, words: str) -> None:
    refused(directory, {"model_type": model_type}, UnsupportedModelError, words)
    refused(directory, {}, UnsupportedModelError, "no model_type")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("llama", "hidden_size", "32"),
        ("llama", "hidden_size", 0),
        ("llama", "hidden_size", 1 << 40),
        ("llama", "hidden_size", True),
        ("llama", "num_hidden_layers", -1),
        ("llama", "num_hidden_layers", 2.5),
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_attention_heads", 5),
        ("llama", "rms_norm_eps", "small"),
        ("llama", "hidden_act", "import os"),
        ("llama", "tie_word_embeddings", "yes"),
        ("llama", "eos_token_id", "2"),
        ("llama", "rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}),
        ("llama", "rope_scaling", {"rope_type": "linear"}),
        ("llama", "dtype", "float33"),
        ("llama", "torch_dtype", "int8"),
        ("llama", "dtype", "torch.load"),
        ("llama", "dtype", 16),
        ("mistral", "sliding_window", 0),
        ("mistral", "sliding_window", "all"),
        ("gpt2", "n_head", 5),
        ("gpt2", "n_embd", -32),
        ("gpt2", "activation_function", "gelu_newer"),
    ],
)
def test_bad_values(directory: Path, kind: str, name: str, value: Any) -> None:
    refused(directory, {**tiny.values(kind), name: value}, ConfigError, "")
    with pytest.raises(ConfigError) as caught:
        AutoConfig.from_pretrained(directory)
    field = {"torch_dtype": "dtype", "rope_scaling": "rope", "rope_parameters": "rope"}.get(name, name)
    names = (field, tiny.CONFIGS[kind].attribute_map.get(field, field))
    assert any(spelling in str(caught.value) for spelling in names)


def test_another_class(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(tiny.values("llama")))
    with pytest.raises(ConfigError, match=r"'llama'.*'mistral'"):
        MistralForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("quantization", [{"quant_method": "new"}, {"quant_method": 4}, {"bits": 4}, {}, [], "nf4"])
def test_unknown_quantization_is_refused(directory: Path, quantization: Any) -> None:
    (directory / "config.json").write_text(json.dumps(tiny.values("llama", quantization_config=quantization)))
    with pytest.raises(QuantizationError):
        AutoModelForCausalLM.from_pretrained(directory)


def test_code_of_the_repository_is_not_run(directory: Path) -> None:
    marker = directory / "ran"
    (directory / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    content = {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    refused(directory, content, RemoteCodeRefused, "modeling_evil.py")
    assert not marker.exists()


def test_unknown_keyword(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(tiny.values("llama")))
    with pytest.raises(ArgumentError, match="did you mean 'device_map'"):
        AutoModelForCausalLM.from_pretrained(directory, device_mpa="cpu")
    with pytest.raises(TypeError, match="load_in_4bit"):
        AutoModelForCausalLM.from_pretrained(directory, load_in_4bit=True)
