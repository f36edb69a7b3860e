"""Arguments that are nonsense: refused before the Hub is asked, a file is read or memory is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input.inputs import good, put, watched

from loadstone import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from loadstone.errors import (
    ArgumentError,
    AttentionError,
    CheckpointError,
    ConfigError,
    DeviceMapError,
    KernelError,
    LoadstoneError,
    NotFoundError,
    PathError,
    QuantizationError,
    RepoIdError,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return put(tmp_path / "checkpoint", good())


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown argument": ({"device_mpa": "cpu"}, ArgumentError, "did you mean 'device_map'"),
    "load_in_4bit": ({"load_in_4bit": True}, ArgumentError, "quantization_config="),
    "a dtype of integers": ({"dtype": torch.int8}, ConfigError, "int8"),
    "a dtype that is unknown": ({"dtype": "float33"}, ConfigError, "did you mean 'float32'"),
    "a dtype that is a number": ({"dtype": 16}, ConfigError, "got 16"),
    "a dtype that is code": ({"torch_dtype": "os.system"}, ConfigError, "'os.system'"),
    "a dtype that is a list": ({"dtype": ["float32"]}, ConfigError, "['float32']"),
    "an unknown device": ({"device_map": "gpu"}, DeviceMapError, "unknown device 'gpu'"),
    "a misspelled device": ({"device_map": "cdua"}, DeviceMapError, "did you mean 'cuda'"),
    "a device that is not there": ({"device_map": "cuda:9"}, DeviceMapError, "cuda:9"),
    "a device number below zero": ({"device_map": -1}, DeviceMapError, "negative"),
    "a device number of a hundred bits": ({"device_map": 1 << 100}, DeviceMapError, "device"),
    "a device of no end of digits": ({"device_map": "cuda:" + "9" * 30}, DeviceMapError, "device"),
    "a device that is true": ({"device_map": True}, DeviceMapError, "not True"),
    "a device that is a fraction": ({"device_map": 0.5}, DeviceMapError, "not 0.5"),
    "a device that is empty": ({"device_map": ""}, DeviceMapError, "''"),
    "a map that is a list": ({"device_map": ["cpu"]}, DeviceMapError, "['cpu']"),
    "an empty map": ({"device_map": {}}, DeviceMapError, "no device for"),
    "a map with an unknown module": ({"device_map": {"": "cpu", "model.layer": "cpu"}}, DeviceMapError, "did you mean"),
    "a map with a number for a name": ({"device_map": {0: "cpu"}}, DeviceMapError, "0"),
    "a map that leaves weights out": ({"device_map": {"model.embed_tokens": "cpu"}}, DeviceMapError, "no device for"),
    "a map with a device that is a list": ({"device_map": {"": ["cpu"]}}, DeviceMapError, "['cpu']"),
    "a map that mixes meta in": ({"device_map": {"": "cpu", "lm_head": "meta"}}, DeviceMapError, "meta"),
    "max_memory that is a text": ({"device_map": "auto", "max_memory": "1GB"}, DeviceMapError, "must map devices"),
    "max_memory of a giga": ({"device_map": "auto", "max_memory": {"cpu": "1 giga"}}, DeviceMapError, "'1 giga'"),
    "max_memory below zero": ({"device_map": "auto", "max_memory": {"cpu": -1}}, DeviceMapError, "-1"),
    "max_memory that is true": ({"device_map": "auto", "max_memory": {"cpu": True}}, DeviceMapError, "True"),
    "max_memory that is infinite": (
        {"device_map": "auto", "max_memory": {"cpu": "9" * 400 + "GB"}},
        DeviceMapError,
        "must be bytes",
    ),
    "max_memory of an unknown device": (
        {"device_map": "auto", "max_memory": {"cuda:x": "1GB"}},
        DeviceMapError,
        "cuda:x",
    ),
    "an unknown attention": ({"attn_implementation": "sdpaa"}, AttentionError, "did you mean 'sdpa'"),
    "an attention of a repository": ({"attn_implementation": "evil/kernel"}, AttentionError, "evil/kernel"),
    "an attention that is a number": ({"attn_implementation": 3}, AttentionError, "3"),
    "an unknown kernel": ({"kernels": "tritton"}, KernelError, "did you mean 'triton'"),
    "a kernel of an unknown operation": ({"kernels": {"softmax2": "torch"}}, KernelError, "softmax2"),
    "pickled weights that are not there": ({"use_safetensors": False}, NotFoundError, "leave out use_safetensors"),
    "a variant that is a path": ({"variant": "../x"}, ArgumentError, "'../x'"),
    "a variant that is not there": ({"variant": "fp16"}, NotFoundError, "variant=None"),
    "a variant that is a number": ({"variant": 16}, ArgumentError, "16"),
    "a subfolder above": ({"subfolder": "../other"}, PathError, "../other"),
    "a subfolder that is absolute": ({"subfolder": "/etc"}, PathError, "/etc"),
    "a subfolder that is not there": ({"subfolder": "sub"}, NotFoundError, "no subfolder 'sub'"),
    "key_mapping that is no expression": ({"key_mapping": {"(": "x"}}, ArgumentError, "not a regex"),
    "key_mapping that is a list": ({"key_mapping": ["a", "b"]}, ArgumentError, "key_mapping"),
    "quantization_config that is true": ({"quantization_config": True}, QuantizationError, "True"),
    "a configuration that is a number": ({"config": 3}, LoadstoneError, "int"),
    "a configuration of another class's": ({"config": LlamaConfig(), "hidden_size": 3}, ArgumentError, "hidden_size"),
    "a field of a wrong type": ({"hidden_size": "32"}, ConfigError, "hidden_size"),
    "generation_config that is a text": ({"generation_config": "fast"}, LoadstoneError, "generation_config"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(directory: Path, name: str) -> None:
    arguments, error, words = CASES[name]
    with watched(directory) as seen, pytest.raises(error) as caught:
        AutoModelForCausalLM.from_pretrained(directory, **arguments)
    assert isinstance(caught.value, LoadstoneError)
    assert words in str(caught.value)
    assert seen == []


NAMES: dict[str, tuple[Any, type[Exception]]] = {
    "empty": ("", RepoIdError),
    "spaces": ("  ", RepoIdError),
    "NUL": ("a\0b", RepoIdError),
    "three parts": ("a/b/c", NotFoundError),
    "above": ("../x/y", NotFoundError),
    "97 letters": ("x" * 97, RepoIdError),
    "ending in .git": ("org/name.git", RepoIdError),
    "two dashes": ("org/na--me", RepoIdError),
    "two dots": ("org/na..me", RepoIdError),
    "an address": ("https://huggingface.co/org/name", NotFoundError),
    "a query": ("org/name?x=1", RepoIdError),
    "letters that look alike": ("\u043erg/name", RepoIdError),
    "a line end": ("org/name\n", RepoIdError),
    "a home that is not there": ("~nobody-of-that-name/x", NotFoundError),
    "a number": (3, ArgumentError),
    "nothing": (None, ArgumentError),
    "bytes": (b"org/name", ArgumentError),
    "a list": (["org/name"], ArgumentError),
    "a file": (__file__, PathError),
    "a device": ("/dev/null", PathError),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_none(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No door asks the Hub for what cannot be a repository."""
    monkeypatch.chdir(tmp_path)
    given, error = NAMES[name]
    for door in (AutoModelForCausalLM, AutoConfig, LlamaForCausalLM, LlamaConfig):
        if name == "a file" and door in (AutoConfig, LlamaConfig):
            error = ConfigError  # which read files by their own name
        with watched(tmp_path) as seen, pytest.raises(error) as caught:
            door.from_pretrained(given)
        assert isinstance(caught.value, LoadstoneError)
        assert [one for one in seen if not one.startswith("open")] == []
        error = NAMES[name][1]


REVISIONS = [
    "../main",
    "a b",
    "/x",
    "",
    "a\0",
    "x\\y",
    "a//b",
    "refs/../x",
    "~",
    "a:b",
    "a?b",
    "*",
    3,
    b"main",
    ["main"],
]


@pytest.mark.parametrize("revision", REVISIONS, ids=repr)
def test_revisions_that_are_none(tmp_path: Path, revision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with watched(tmp_path) as seen, pytest.raises(NotFoundError, match="cannot be a revision"):
        AutoModelForCausalLM.from_pretrained("org/name", revision=revision, cache_dir=tmp_path)
    assert [one for one in seen if not one.startswith("open")] == []


SAVES: dict[str, dict[str, Any]] = {
    "a shard size that is a word": {"max_shard_size": "big"},
    "a shard size of nothing": {"max_shard_size": 0},
    "a shard size below zero": {"max_shard_size": "-5GB"},
    "a shard size that is true": {"max_shard_size": True},
    "a shard size that is infinite": {"max_shard_size": "9" * 400 + "GB"},
    "a variant that is a path": {"variant": "../x"},
    "a variant with NUL": {"variant": "a\0"},
    "a state of no tensors": {"state_dict": {"a": [1.0]}},
    "a name that no reader takes": {"state_dict": {"a\x1b[2J": torch.zeros(1)}},
}


@pytest.mark.parametrize("name", SAVES)
def test_saves_that_are_refused(tmp_path: Path, directory: Path, name: str) -> None:
    from bad_input.inputs import snapshot

    model = AutoModelForCausalLM.from_pretrained(directory)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError):
        model.save_pretrained(directory, **SAVES[name])
    with pytest.raises(CheckpointError):
        model.save_pretrained(tmp_path / "new", **SAVES[name])
    assert snapshot(tmp_path) == before
