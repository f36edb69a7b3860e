"""Generation options: checked, round-tripped, merged in the order users know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone.errors import ArgumentError, ConfigError, GenerationError, LoadstoneError, NotFoundError
from loadstone.models.generation import GenerationConfig
from loadstone.models.generation.configuration import FILE_NAME
from loadstone.models.generation.options import UNSUPPORTED, merge, resolve

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "max_length": st.integers(1, 99),
    "min_new_tokens": st.integers(0, 9),
    "stop_strings": st.one_of(st.text(min_size=1), st.lists(st.text(min_size=1), min_size=1)),
    "do_sample": st.booleans(),
    "num_beams": st.integers(1, 9),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "length_penalty": st.floats(-3, 3),
    "temperature": st.floats(0, 5),
    "top_k": st.integers(0, 99),
    "top_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 5),
    "bad_words_ids": st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1),
    "eos_token_id": st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9))),
    "pad_token_id": st.integers(-1, 9),
    "cache_implementation": st.sampled_from(["static", "dynamic", "hybrid"]),
}
UNKNOWN = st.dictionaries(st.sampled_from(["transformers_version", "penalty_alpha", "x"]), st.integers())


@tiny.examples(60)
@given(st.fixed_dictionaries({}, optional=VALUES), UNKNOWN)
def test_a_file_round_trips(tmp_path_factory: Any, values: dict[str, Any], unknown: dict[str, int]) -> None:
    directory = tmp_path_factory.mktemp("config")
    written = values | unknown
    (directory / "generation_config.json").write_text(json.dumps(written))
    config = GenerationConfig.from_pretrained(directory)
    assert config.to_dict() == written
    config.save_pretrained(directory / "again")
    assert GenerationConfig.from_pretrained(directory / "again") == config
    assert [path.name for path in (directory / "again").iterdir()] == ["generation_config.json"]
    for name, value in unknown.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_length", -1),
        ("num_beams", 0),
        ("num_return_sequences", 0),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("early_stopping", "sometimes"),
        ("eos_token_id", "</s>"),
        ("bad_words_ids", [1, 2]),
        ("do_sample", "yes"),
        ("stop_strings", 3),
    ],
)
def test_wrong_values(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(GenerationError, match=name):
        GenerationConfig(**{name: value})
    config = GenerationConfig()
    with pytest.raises(GenerationError, match=name):
        setattr(config, name, value)
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ConfigError, match=FILE_NAME):
        GenerationConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"max_length": 1, "max_length": 2}', '{"temperature": NaN}'])
def test_wrong_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=FILE_NAME):
        GenerationConfig.from_pretrained(tmp_path)


def test_missing_file_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=FILE_NAME):
        GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="did you mean 'temperature'"):
        GenerationConfig().temprature = 1.0
    with pytest.raises(ArgumentError, match="did you mean 'top_k'"):
        GenerationConfig.from_dict({}, topk=3)
    assert GenerationConfig().update(top_k=3, unknown=4) == {"unknown": 4}


def test_from_model_config() -> None:
    config = tiny.model("llama", eos_token_id=[3, 4], pad_token_id=1, temperature=0.5, top_p="nonsense").config
    derived = GenerationConfig.from_model_config(config)
    assert (derived.eos_token_id, derived.pad_token_id, derived.temperature) == ([3, 4], 1, 0.5)
    assert derived.top_p is None
    assert derived.use_cache is None
    assert GenerationConfig(eos_token_id=torch.tensor([1, 2])).eos_token_id == [1, 2]


def test_what_a_caller_gives_is_checked_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same check as for `model.generation_config = ...`; what is good arrives as ours."""
    model = tiny.checkpoint(tmp_path, "llama")

    class Theirs:
        def __init__(self, **values: Any) -> None:
            self.values = values

        def to_diff_dict(self) -> dict[str, Any]:
            return self.values

    for chosen, error in (
        (Theirs(temperature=-1.0), GenerationError),
        (model.config, ArgumentError),
        ({"top_k": 3}, ArgumentError),
        ("greedy", ArgumentError),
    ):
        with pytest.raises(error):
            model.generation_config = chosen
        with monkeypatch.context() as patch:
            patch.setattr("loadstone.models.pretrained.build_on_meta", None)
            with pytest.raises(error):
                type(model).from_pretrained(tmp_path, generation_config=chosen)
    loaded = type(model).from_pretrained(tmp_path, generation_config=Theirs(top_k=3, _hash=1))
    assert type(loaded.generation_config) is GenerationConfig
    assert loaded.generation_config.to_dict() == {"top_k": 3}


def options(model: GenerationConfig, given: GenerationConfig | None = None, length: int = 5, **kwargs: Any) -> Any:
    return resolve(merge(model, given, kwargs), prompt_length=length, embeds_length=None, max_positions=64)


def test_precedence() -> None:
    model = GenerationConfig(temperature=0.1, top_k=1, top_p=0.1, eos_token_id=7, max_new_tokens=3)
    result = options(model, GenerationConfig(top_k=2, top_p=0.2), top_p=0.3, do_sample=True)
    assert (result.temperature, result.top_k, result.top_p, result.eos) == (0.1, 2, 0.3, (7,))
    assert result.pad == 7
    assert result.max_length == 8
    assert options(model, eos_token_id=None).eos == ()
    assert options(model, top_k=None, do_sample=True).top_k == 50


def test_lengths() -> None:
    with pytest.warns(UserWarning, match="20 new tokens"):
        assert options(GenerationConfig()).max_length == 25
    with pytest.warns(UserWarning, match="20 new tokens"):
        assert options(GenerationConfig(), length=50).max_length == 64
    assert options(GenerationConfig(max_length=9)).max_length == 9
    assert options(GenerationConfig(max_length=9), max_new_tokens=9).max_length == 14
    assert options(GenerationConfig(max_length=9), min_new_tokens=2).min_length == 7
    with pytest.raises(GenerationError, match="prompt has 5 tokens"):
        options(GenerationConfig(max_length=5))
    with pytest.warns(UserWarning, match="shortest"):
        options(GenerationConfig(max_length=9), min_length=10)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "temperature": 0.0},
        {"num_return_sequences": 2},
        {"num_beams": 2, "num_return_sequences": 3},
        {"stop_strings": [""]},
        {"bad_words_ids": [[]]},
        {"cache_implementation": "static", "use_cache": False},
        {"cache_implementation": "quantized"},
        {"penalty_alpha": 0.6},
        {"num_beam_groups": 2},
        {"max_new_tokens": -1},
    ],
)
def test_contradictions(kwargs: dict[str, Any]) -> None:
    with pytest.raises(GenerationError):
        options(GenerationConfig(), **{"max_new_tokens": 3} | kwargs)


def test_unsupported_options() -> None:
    for name, neutral in UNSUPPORTED.items():
        for value in neutral:
            options(GenerationConfig(max_new_tokens=1), **{name: value})
        assert name not in GenerationConfig.field_names()
    with pytest.raises(ArgumentError, match="did you mean 'max_new_tokens'"):
        options(GenerationConfig(), max_new_token=3)
    with pytest.raises(TypeError):
        options(GenerationConfig(), whatever=3)


def test_a_file_that_asks_for_the_impossible_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    config = GenerationConfig.from_dict({"penalty_alpha": 0.61, "max_new_tokens": 1})
    options(config)
    assert "penalty_alpha=0.61" in caplog.text
    assert issubclass(GenerationError, LoadstoneError)
