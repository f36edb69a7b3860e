"""`BitsAndBytesConfig`: what it takes, what it refuses, and that it comes back from its JSON as it was."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import examples

from loadstone import BitsAndBytesConfig
from loadstone.errors import QuantizationError

FLOATS = ("float32", "float16", "bfloat16")
NAMES = st.text("abcdefgh_.0123", min_size=1, max_size=12)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3))


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Any fields that are right, some left out."""
    four = draw(st.booleans())
    rest = st.fixed_dictionaries(
        {},
        optional={
            "llm_int8_threshold": st.floats(0, 100),
            "llm_int8_skip_modules": st.none() | st.lists(NAMES, max_size=3),
            "llm_int8_enable_fp32_cpu_offload": st.booleans(),
            "bnb_4bit_compute_dtype": st.none() | st.sampled_from([*FLOATS, torch.bfloat16, "torch.float16"]),
            "bnb_4bit_quant_type": st.sampled_from(["nf4", "fp4"]),
            "bnb_4bit_use_double_quant": st.booleans(),
            "bnb_4bit_quant_storage": st.none() | st.sampled_from([*FLOATS, "uint8", "int8", torch.float32]),
        },
    )
    return {"load_in_4bit": four, "load_in_8bit": not four, **draw(rest)}


@given(fields(), st.dictionaries(st.text("xyz", min_size=4, max_size=6), JSON, max_size=2))
@examples(60)
def test_round_trip(values: dict[str, Any], unknown: dict[str, Any]) -> None:
    """Through dictionary, JSON, pickle and copy; unknown fields are kept."""
    config = BitsAndBytesConfig(**values, **unknown)
    written = json.loads(json.dumps(config.to_dict()))
    again = BitsAndBytesConfig.from_dict(written)
    assert again == config
    assert again.to_dict() == written
    assert {name: written[name] for name in unknown} == unknown
    assert written["quant_method"] == "bitsandbytes"
    assert written["_load_in_4bit"] == written["load_in_4bit"] == config.load_in_4bit
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    if values["load_in_4bit"]:  # the differences from the defaults say the same
        assert BitsAndBytesConfig.from_dict(json.loads(config.to_json_string())) == config


def test_defaults_are_those_users_know() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert config.to_dict() == {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
        "_load_in_8bit": False, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    assert (config.quantization_method(), config.is_quantizable()) == ("fp4", True)
    assert BitsAndBytesConfig(load_in_8bit=True).quantization_method() == "llm_int8"
    assert BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").quantization_method() == "nf4"
    assert config.to_diff_dict() == {"load_in_4bit": True, "_load_in_4bit": True}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"load_in_4bit": False}, "no bits"),
        ({"load_in_8bit": True}, "both True"),
        ({"load_in_4bit": 1}, "load_in_4bit"),
        ({"bnb_4bit_quant_type": "nf5"}, "did you mean 'nf4'"),
        ({"bnb_4bit_quant_type": None}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_compute_dtype": "bfloat17"}, "did you mean 'bfloat16'"),
        ({"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype"),
        ({"bnb_4bit_compute_dtype": torch.int64}, "bnb_4bit_compute_dtype"),
        ({"bnb_4bit_compute_dtype": 16}, "bnb_4bit_compute_dtype"),
        ({"bnb_4bit_quant_storage": "system"}, "bnb_4bit_quant_storage"),
        ({"bnb_4bit_use_double_quant": "yes"}, "bnb_4bit_use_double_quant"),
        ({"llm_int8_threshold": -1.0}, "llm_int8_threshold"),
        ({"llm_int8_threshold": float("nan")}, "llm_int8_threshold"),
        ({"llm_int8_threshold": "6"}, "llm_int8_threshold"),
        ({"llm_int8_threshold": True}, "llm_int8_threshold"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        ({"llm_int8_skip_modules": [3]}, "llm_int8_skip_modules"),
        ({"llm_int8_has_fp16_weight": True}, "not available"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"_load_in_4bit": False}, "contradicts"),
    ],
)
def test_wrong_values(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        BitsAndBytesConfig(**{"load_in_4bit": True, **wrong})
    with pytest.raises(QuantizationError, match=message):
        BitsAndBytesConfig.from_dict({"load_in_4bit": True, **wrong})


def test_no_bits_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="no bits"):
        BitsAndBytesConfig()
    with pytest.raises(QuantizationError, match="must be an object"):
        BitsAndBytesConfig.from_dict([1])  # type: ignore[arg-type]


def test_unknown_fields_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loadstone.quant"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtyp="bfloat16")
    assert "bnb_4bit_compute_dtyp" in caplog.text
    assert "did you mean 'bnb_4bit_compute_dtype'" in caplog.text


def test_from_dict_with_keywords() -> None:
    config, unused = BitsAndBytesConfig.from_dict(
        {"_load_in_4bit": True}, return_unused_kwargs=True, bnb_4bit_quant_type="nf4", other=3
    )
    assert (config.quantization_method(), unused) == ("nf4", {"other": 3})


def test_update_changes_all_or_nothing() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert config.update(bnb_4bit_quant_type="nf4", other=1) == {"other": 1}
    assert config.quantization_method() == "nf4"
    before = config.to_dict()
    with pytest.raises(QuantizationError, match="both True"):
        config.update(load_in_8bit=True, bnb_4bit_quant_type="fp4")
    assert config.to_dict() == before
    config.update(load_in_8bit=True, load_in_4bit=False)
    assert config.quantization_method() == "llm_int8"
