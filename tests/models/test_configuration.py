"""Configurations: what they accept, what they refuse, and that nothing is lost between a file and a file."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedConfig
from loadstone.errors import ConfigError, NotFoundError

kinds = pytest.mark.parametrize("kind", tiny.KINDS)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def write(directory: Path, values: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


# Round trips


@kinds
@tiny.examples(40)
@given(extra=st.dictionaries(st.from_regex(r"x_[a-z0-9_]{1,12}", fullmatch=True), json_values, max_size=4))
def test_round_trip_keeps_unknown_fields(
    kind: str, extra: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = tiny.values(kind, **extra)
    config = tiny.CONFIGS[kind].from_dict(values)
    folder = tmp_path_factory.mktemp("c")
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    assert {name: stored[name] for name in values} == values
    again = AutoConfig.from_pretrained(folder)
    assert again == config
    assert type(again) is tiny.CONFIGS[kind]
    assert all(getattr(again, name) == value for name, value in extra.items())
    again.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text()) == stored


@kinds
def test_copies_are_equal_and_apart(kind: str) -> None:
    config = tiny.CONFIGS[kind].from_dict(tiny.values(kind, a_list=[1, 2]), attn_implementation="eager")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other._attn_implementation == "eager"
        other.a_list.append(3)
        other.hidden_size = 8
        assert config.a_list == [1, 2]
        assert config.hidden_size == 32
        assert other != config


def test_to_dict_is_a_copy() -> None:
    config = LlamaConfig.from_dict(tiny.values("llama"))
    config.to_dict()["rope_parameters"]["rope_theta"] = 3.0
    assert config.rope_parameters is not None
    assert config.rope_parameters["rope_theta"] == 10000.0
    given_rope = {"rope_type": "linear", "factor": 2.0}
    LlamaConfig(rope_parameters=given_rope)
    assert given_rope == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}},
         {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ({"rope_theta": 9.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
         {"rope_type": "dynamic", "factor": 2, "rope_theta": 9.0}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, "rope_theta": 9.0},
         {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}),
        ({"rope_parameters": None, "rope_theta": 9.0}, {"rope_type": "default", "rope_theta": 9.0}),
        ({"rope_theta": 9.0, "rope_scaling": {"type": "yarn", "factor": 2.0}},
         {"rope_type": "yarn", "factor": 2.0, "rope_theta": 9.0, "original_max_position_embeddings": 64}),
    ],
)  # fmt: skip
def test_both_spellings_of_rope(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = LlamaConfig.from_dict(tiny.values("llama", **values))
    assert config.rope_parameters == wanted
    assert config.rope_theta == wanted["rope_theta"]
    assert config.rope_scaling == (None if wanted["rope_type"] == "default" else wanted)
    written = config.to_dict()
    assert "rope_scaling" not in written
    assert "rope_theta" not in written
    assert LlamaConfig.from_dict(written) == config


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ({"rope_theta": 3e5}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
         {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5e5}),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1.5}},
         {"rope_type": "linear", "factor": 8.0, "rope_theta": 1.5}),
    ],
)  # fmt: skip
def test_overriding_rope(override: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    """The older names override one part and leave the other as the file has it."""
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    directory = write(tmp_path / "c", tiny.values("llama", **old))
    assert AutoConfig.from_pretrained(directory, **override).rope_parameters == wanted
    config = AutoConfig.from_pretrained(directory)
    for name, value in override.items():
        setattr(config, name, value)
    assert config.rope_parameters == wanted


def test_dtype_spellings() -> None:
    for name in ("dtype", "torch_dtype"):
        for value in ("bfloat16", "torch.bfloat16", torch.bfloat16):
            config = LlamaConfig.from_dict(tiny.values("llama", **{name: value}))
            assert config.dtype is config.torch_dtype is torch.bfloat16
            assert config.to_dict()["dtype"] == "bfloat16"
            assert "torch_dtype" not in config.to_dict()
    config.torch_dtype = "float16"
    assert config.dtype is torch.float16
    assert LlamaConfig(dtype="float32", torch_dtype="float16").dtype is torch.float32


def test_attribute_map() -> None:
    config = GPT2Config(hidden_size=64, num_hidden_layers=3, n_head=4)
    assert (config.n_embd, config.n_layer, config.num_attention_heads) == (64, 3, 4)
    config.hidden_size = 32
    assert config.n_embd == 32
    assert config.head_dim == 8
    written = config.to_dict()
    assert written["n_embd"] == 32
    assert "hidden_size" not in written
    with pytest.raises(ConfigError, match="n_embd"):
        config.hidden_size = 0
    assert GPT2Config.from_dict({"n_embd": 24, "n_head": 2}, hidden_size=12).n_embd == 12


def test_derived_fields() -> None:
    assert LlamaConfig(num_attention_heads=8, hidden_size=64).num_key_value_heads == 8
    assert LlamaConfig(num_attention_heads=8, hidden_size=64).head_dim == 8
    assert LlamaConfig(num_attention_heads=3, hidden_size=64, head_dim=10).head_dim == 10
    assert MistralConfig().num_key_value_heads == 8
    assert MistralConfig(sliding_window=None).sliding_window is None


# Refusals


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("llama", {"hidden_size": 10**12}, "hidden_size must be at most"),
        ("llama", {"hidden_size": -16}, "hidden_size must be at least 1, got -16"),
        ("llama", {"hidden_size": 16.5}, "hidden_size must be an integer, got 16.5"),
        ("llama", {"num_hidden_layers": 10**5}, "num_hidden_layers must be at most"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "not a multiple of num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ("llama", {"head_dim": 7}, "even head_dim"),
        ("llama", {"vocab_size": 1 << 62}, "vocab_size must be at most"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps must be at least 0"),
        ("llama", {"rope_theta": 0}, "rope_theta"),
        ("llama", {"rope_theta": -1.0}, "rope_theta"),
        ("llama", {"rope_theta": "10000"}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "factor"),
        ("llama", {"rope_parameters": {"rope_type": "linaer", "factor": 2.0}}, "did you mean 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters must be"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
         "list of 4 positive numbers"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": "1111", "long_factor": [1.0] * 4}},
         "list of 4 positive numbers"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": "1", "mscale_all_dim": 1}},
         "mscale"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
                                       "factor": 4.0, "original_max_position_embeddings": 1}}, "original_max"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"hidden_act": "__import__"}, "hidden_act"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
        ("llama", {"dtype": "os.system"}, "dtype"),
        ("llama", {"dtype": "int32"}, "dtype"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ("llama", {"attention_bias": "true"}, "attention_bias must be true or false"),
        ("llama", {"attention_dropout": 1.5}, "attention_dropout must be at most 1"),
        ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures"),
        ("mistral", {"sliding_window": -4}, "sliding_window must be at least 1"),
        ("mistral", {"sliding_window": 4.5}, "sliding_window"),
        ("gpt2", {"n_inner": 0}, "n_inner must be at least 1"),
        ("gpt2", {"n_positions": 0}, "n_positions must be at least 1"),
        ("gpt2", {"resid_pdrop": -0.1}, "resid_pdrop must be at least 0"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"scale_attn_weights": 0}, "scale_attn_weights must be true or false"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(kind: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.CONFIGS[kind].from_dict(tiny.values(kind, **values))
    assert words in str(caught.value)


def test_setting_an_attribute_checks_it_too() -> None:
    config = LlamaConfig()
    for name, value in [("hidden_size", 0), ("hidden_act", "x"), ("rms_norm_eps", "a"), ("dtype", "int8")]:
        before = getattr(config, name)
        with pytest.raises(ConfigError, match=name):
            setattr(config, name, value)
        assert getattr(config, name) == before
    config.rms_norm_eps = 0
    assert isinstance(config.rms_norm_eps, float)


def test_huge_positions_cost_nothing() -> None:
    config = LlamaConfig.from_dict(tiny.values("llama", max_position_embeddings=10**15))
    model = LlamaForCausalLM(config).eval()
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 61)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@tiny.examples(60)
@given(entry=st.dictionaries(
    st.sampled_from(("rope_type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "short_factor",
                     "long_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
                     "truncate", "original_max_position_embeddings", "partial_rotary_factor")),
    st.sampled_from(("default", "linear", "dynamic", "llama3", "yarn", "longrope", 1, 2, 0.5, 1.0, 8.0, 64, 1e-9, 0,
                     -1, 1e30, True, None, [1.0] * 4, [2.0] * 4, [], "x", {})),
))  # fmt: skip
def test_rope_that_is_accepted_works(kind: str, entry: dict[str, Any]) -> None:
    """Whatever is in rope_parameters: a ConfigError that names it, or a model whose output is finite."""
    try:
        config = tiny.CONFIGS[kind].from_dict(tiny.values(kind, rope_parameters=entry))
    except ConfigError as error:
        message = str(error)
    else:
        model = tiny.MODELS[kind](config).eval()
        assert torch.isfinite(model(torch.arange(40)[None]).logits).all()
        return
    assert "rope" in message or "rotary" in message


@pytest.mark.parametrize(
    "name", ["validate", "to_dict", "from_pretrained", "attribute_map", "keys_to_ignore_at_inference", "has_field"]
)
@kinds
def test_a_file_cannot_replace_methods(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        tiny.CONFIGS[kind].from_dict(tiny.values(kind, **{name: 1}))


def test_fields_that_are_derived_here_are_kept() -> None:
    """A file may hold what this class computes; it is written back and counts for nothing."""
    config = GPT2Config.from_dict(tiny.values("gpt2", head_dim=99, num_key_value_heads=99))
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)
    assert config.to_dict()["head_dim"] == 99


# Files


@kinds
def test_never_a_default_model(kind: str, tmp_path: Path) -> None:
    """No config.json is an error, not a model of the default size."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    for call in (tiny.CONFIGS[kind].from_pretrained, tiny.MODELS[kind].from_pretrained):
        for place in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises((NotFoundError, ConfigError)):
                call(place)


def test_from_a_file_or_a_directory(tmp_path: Path) -> None:
    directory = write(tmp_path / "c", tiny.values("llama"))
    for place in (directory, str(directory), directory / "config.json", str(directory / "config.json")):
        for door in (LlamaConfig, AutoConfig):
            config = door.from_pretrained(place)
            assert config.hidden_size == 32
            assert config.name_or_path == str(place)
    (directory / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(tiny.values("llama")).encode())
    assert LlamaConfig.from_pretrained(directory).hidden_size == 32  # a byte-order mark is no content
    write(tmp_path / "sub", tiny.values("gpt2"))
    assert AutoConfig.from_pretrained(tmp_path, subfolder="sub").n_embd == 32


def test_overrides_and_unused_arguments(tmp_path: Path) -> None:
    directory = write(tmp_path / "c", tiny.values("llama", a_note="x"))
    for door in (LlamaConfig, AutoConfig):
        config, unused = door.from_pretrained(
            directory, use_cache=False, a_note="y", colour="red", return_unused_kwargs=True
        )
        assert unused == {"colour": "red"}
        assert config.use_cache is False
        assert config.a_note == "y"
        assert not hasattr(config, "colour")
        with pytest.raises(ConfigError, match="hidden_size"):
            door.from_pretrained(directory, hidden_size="64")
    assert LlamaConfig.from_pretrained(directory, head_dim=None, hidden_size=64).head_dim == 16


def test_what_only_a_caller_may_choose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file names no kernel, no trust, no place: such fields are ignored, foreign attention with a warning."""
    hostile = {
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "_name_or_path": "/etc",
        "name_or_path": "/etc",
        "trust_remote_code": True,
        "use_kernels": True,
    }
    directory = write(tmp_path / "c", tiny.values("llama", **hostile))
    with caplog.at_level(logging.WARNING):
        config = AutoConfig.from_pretrained(directory)
    assert "evil/kernel" in caplog.text
    assert config._attn_implementation is None
    assert config.name_or_path == str(directory)
    assert not any("evil" in str(value) for value in config.to_dict().values())
    assert "trust_remote_code" not in config.to_dict()
    assert AutoConfig.from_pretrained(directory, attn_implementation="eager")._attn_implementation == "eager"


def test_saving(tmp_path: Path) -> None:
    config = LlamaConfig()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        config.save_pretrained(tmp_path / "file")
    config.save_pretrained(tmp_path / "new" / "deep")
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["config.json"]
    before = (tmp_path / "new" / "deep" / "config.json").read_text()
    for bad in (object(), float("nan"), {1: {2}}):
        config.a_field = bad
        with pytest.raises(ConfigError, match=r"config\.json"):
            config.save_pretrained(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep" / "config.json").read_text() == before


def test_a_configuration_of_ones_own() -> None:
    """Declaring fields is all it takes."""

    class OwnConfig(PreTrainedConfig):
        model_type = "own"
        width: int = 4
        names: list[str] | None = None

    config = OwnConfig(width=8, extra=1)
    assert OwnConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["model_type"] == "own"
    for bad in ({"width": "4"}, {"width": None}, {"names": [1]}):
        with pytest.raises(ConfigError, match="OwnConfig"):
            OwnConfig(**bad)
    with pytest.raises(TypeError):
        OwnConfig(4)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="OwnConfig"):
        _ = config.nothing
