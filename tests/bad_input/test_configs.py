"""config.json of strangers: malformed, of the wrong types, of sizes that nothing could hold, or asking for code."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
from bad_input.inputs import MARK, Case, case, config, good, put, refused, table, watched, write

from loadstone import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from loadstone.errors import (
    ConfigError,
    MemoryLimitError,
    MissingWeightsError,
    RemoteCodeRefused,
    ShapeMismatchError,
    UnsupportedModelError,
)
from loadstone.models import pretrained

FILE = "config.json"


def text(data: bytes, *words: str) -> Case:
    return case(write(FILE, data), ConfigError, FILE, *words)


def field(name: str, value: Any, *words: str, kind: str = "llama") -> Case:
    return case(write(FILE, {**tiny.values(kind), name: value}), ConfigError, *(words or (name,)))


def model_type(value: Any, *words: str) -> Case:
    return case(config(model_type=value), UnsupportedModelError, *words)


def rope(**values: Any) -> Case:
    return case(config(rope_parameters=values), ConfigError, "rope")


MALFORMED = {
    "empty": text(b"", "not valid JSON"),
    "cut off": text(good()[FILE][:-9], "not valid JSON"),
    "not UTF-8": text(b'{"model_type": "llama\xff"}', "not valid JSON"),
    "UTF-16": text('{"model_type": "llama"}'.encode("utf-16"), "not valid JSON"),
    "a list": text(b"[]", "must hold a JSON object, got list"),
    "a number": text(b"3", "must hold a JSON object, got int"),
    "null": text(b"null", "must hold a JSON object"),
    "a web page": text(b"<!DOCTYPE html>", "not valid JSON"),
    "a key twice": text(b'{"model_type": "llama", "model_type": "gpt2"}', "'model_type' is there twice"),
    "a key twice, spelled differently": text(b'{"model_type": "llama", "model\\u005ftype": "gpt2"}', "is there twice"),
    "a key twice deep inside": text(b'{"rope_parameters": {"a": {"b": 1, "b": 2}}}', "'b' is there twice"),
    "NaN": text(b'{"rms_norm_eps": NaN}', "NaN is not JSON"),
    "minus infinity": text(b'{"rms_norm_eps": -Infinity}', "-Infinity is not JSON"),
    "a number that overflows": text(b'{"rms_norm_eps": 1e999}', "too large"),
    "a number of four thousand digits": text(b'{"hidden_size": ' + b"9" * 4000 + b"}", "whole number of"),
    "a number of five thousand digits": text(b'{"hidden_size": ' + b"9" * 5000 + b"}", FILE),
    "half a surrogate pair": text(rb'{"model_type": "\ud800"}', "surrogates"),
    "nested seventy deep": text(b'{"x": ' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64 deep"),
    "nested a hundred thousand deep": text(b'{"a":' * 100_000, "nested too deep"),
    "over four megabytes": text(b'{"a": "' + b"x" * (4 << 20) + b'"}', "a configuration is at most"),
    "a comment": text(b'{"model_type": "llama"} // yes', "not valid JSON"),
    "two objects": text(b'{"model_type": "llama"}{}', "not valid JSON"),
}
TYPES = {
    "no model_type": model_type(..., "has no model_type", "registered: "),
    "model_type null": model_type(None, "has no model_type"),
    "model_type a number": model_type(3, "must be a string"),
    "model_type a list": model_type(["llama"], "must be a string"),
    "an unknown model_type": model_type("bert", "'bert' is not registered", "registered: "),
    "a misspelled model_type": model_type("lama", "did you mean 'llama'"),
    "a model_type that is a path": model_type("../llama", "is not registered"),
    "a model_type that is a module": model_type("os:system", "is not registered"),
    "a model_type of a megabyte": model_type("x" * (1 << 20), "is not registered", "characters left out"),
    "a model_type with an escape sequence": model_type("\x1b]0;x\x07", "is not registered", "\\x1b"),
}
FIELDS = {
    "hidden_size a text": field("hidden_size", "32"),
    "hidden_size true": field("hidden_size", True),
    "hidden_size a fraction": field("hidden_size", 32.5),
    "hidden_size null": field("hidden_size", None),
    "hidden_size a list": field("hidden_size", [32]),
    "hidden_size zero": field("hidden_size", 0, "hidden_size must be at least 1"),
    "hidden_size below zero": field("hidden_size", -16, "hidden_size must be at least 1"),
    "hidden_size 10^12": field("hidden_size", 10**12, "hidden_size must be at most"),
    "intermediate_size 10^12": field("intermediate_size", 10**12, "intermediate_size must be at most"),
    "vocab_size 2^62": field("vocab_size", 1 << 62, "vocab_size must be at most"),
    "vocab_size of a hundred bits": field("vocab_size", 1 << 100, "vocab_size is a whole number of 101 bits"),
    "head_dim 10^9": field("head_dim", 10**9, "head_dim must be at most"),
    "head_dim odd": field("head_dim", 7, "head_dim"),
    "max_position_embeddings 10^30": field("max_position_embeddings", 10**30),
    "n_positions 10^12": field("n_positions", 10**12, "n_positions must be at most", kind="gpt2"),
    "no attention heads": field("num_attention_heads", 0),
    "heads that do not divide the width": field("num_attention_heads", 5),
    "key heads that do not divide the heads": field("num_key_value_heads", 3),
    "no key heads": field("num_key_value_heads", 0),
    "ten thousand key heads": field("num_key_value_heads", 10_000),
    "no layers": field("num_hidden_layers", 0),
    "layers below zero": field("num_hidden_layers", -1),
    "layers a fraction": field("num_hidden_layers", 2.0),
    "layers true": field("num_hidden_layers", True),
    "10^5 layers": field("num_hidden_layers", 10**5),
    "10^9 layers": field("num_hidden_layers", 10**9),
    "10^5 layers, in GPT-2's spelling": field("n_layer", 10**5, kind="gpt2"),
    "5000 layers, where the files have two": field(
        "num_hidden_layers", 5000, "num_hidden_layers=5000", "2 layers at most"
    ),
    "rms_norm_eps a text": field("rms_norm_eps", "small"),
    "rms_norm_eps below zero": field("rms_norm_eps", -1e-6),
    "an unknown activation": field("hidden_act", f"{MARK}.system"),
    "an activation of Python's": field("hidden_act", "__import__('os')"),
    "an activation that is a list": field("hidden_act", ["silu"]),
    "a dtype that is a function": field("dtype", "torch.load"),
    "a dtype that is a module's": field("torch_dtype", "os.system", "dtype"),
    "a dtype of integers": field("torch_dtype", "int32", "dtype"),
    "a dtype that is a number": field("dtype", 16),
    "tie_word_embeddings a text": field("tie_word_embeddings", "no"),
    "tie_word_embeddings a number": field("tie_word_embeddings", 1),
    "use_cache a text": field("use_cache", "false"),
    "a token id that is a text": field("eos_token_id", "2"),
    "a token id that is true": field("bos_token_id", True),
    "token ids with a text among them": field("eos_token_id", [2, "3"]),
    "a token id of a hundred bits": field("eos_token_id", [1 << 100]),
    "architectures a text": field("architectures", "LlamaForCausalLM"),
    "a dropout above one": field("attention_dropout", 1.5),
    "a window of nothing": field("sliding_window", 0, kind="mistral"),
    "a window that is a text": field("sliding_window", "all", kind="mistral"),
    "a field named as a method": field("save_pretrained", "x"),
    "a field named as a class attribute": field("attribute_map", {"hidden_size": "x"}),
    "a field named as the check": field("validate", None),
    "cross-attention": field("add_cross_attention", True, kind="gpt2"),
    "an unknown rope_type": rope(rope_type="spiral"),
    "a rope_type that is a list": rope(rope_type=["linear"]),
    "rope_parameters that is a list": case(config(rope_parameters=[1]), ConfigError, "rope_parameters"),
    "rope_scaling that is a text": case(config(rope_scaling="linear"), ConfigError, "rope_parameters"),
    "rope without its factor": rope(rope_type="linear"),
    "a rope factor of zero": rope(rope_type="linear", factor=0),
    "a rope factor that is true": rope(rope_type="linear", factor=True),
    "a rope_theta below zero": rope(rope_theta=-1),
    "a rope_theta of 10^300": rope(rope_theta=1e300),
    "longrope with too few factors": rope(rope_type="longrope", short_factor=[1.0], long_factor=[1.0]),
    "longrope with a factor that is a text": rope(rope_type="longrope", short_factor=["1"] * 4, long_factor=[1.0] * 4),
}
CODE = {
    "code of the repository": case(
        config(model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}),
        RemoteCodeRefused,
        "modeling_evil.py",
    ),
    "code by a path": case(
        config(model_type="evil", auto_map={"AutoModelForCausalLM": "../../evil.Evil"}), RemoteCodeRefused, "evil"
    ),
    "code of another repository": case(
        config(model_type="evil", auto_map={"AutoConfig": "other/repo--evil.Evil"}), RemoteCodeRefused, "evil.py"
    ),
    "code that trusts itself": case(
        config(model_type="evil", trust_remote_code=True, auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        RemoteCodeRefused,
        "evil.py",
    ),
    "an auto_map that is a number": case(config(model_type="evil", auto_map=3), UnsupportedModelError, "evil"),
}
CASES = {**MALFORMED, **TYPES, **FIELDS, **CODE}
FITS = {
    "a vocabulary larger than the weights": case(config(vocab_size=62), ShapeMismatchError, "embed_tokens", "(61, 32)"),
    "key heads that the weights have not": case(config(num_key_value_heads=4), ShapeMismatchError, "k_proj"),
    "a width of a million": case(
        config(hidden_size=1 << 20, num_attention_heads=1 << 10, num_key_value_heads=1 << 10),
        ShapeMismatchError,
        "1048576",
    ),
    "another architecture's weights": case(
        write(FILE, tiny.values("gpt2")), MissingWeightsError, "nearly all would be random"
    ),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return put(tmp_path / "checkpoint", good())


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with a configuration is found before a module is made."""

    def build(*arguments: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(pretrained, "build_on_meta", build)


@table(CASES)
@pytest.mark.usefixtures("nothing_is_built")
def test_refused(directory: Path, row: Case) -> None:
    doors = [AutoModelForCausalLM.from_pretrained]
    if "layers at most" not in row.words[-1]:  # which only the weights tell
        doors.append(AutoConfig.from_pretrained)
    refused(directory, row, *doors)


@table(FITS)
def test_does_not_fit_the_weights(directory: Path, row: Case) -> None:
    refused(directory, row, AutoModelForCausalLM.from_pretrained)


TOLERATED: dict[str, dict[str, Any]] = {
    "a byte order mark": {},
    "unknown fields": {"model_max_length": 10**30, "x": {"y": [1, {"z": None}]}, "": 1, "a.b": 2, "\u00fc": "\u00fc"},
    "a kernel of a repository": {"_attn_implementation_internal": "evil/kernel", "_attn_implementation": "evil/kernel"},
    "an attention of a repository": {"attn_implementation": "evil/kernel"},
    "trust in itself": {"trust_remote_code": True, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
    "kernels": {"use_kernels": True, "kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"}},
    "another place": {"_name_or_path": "/etc", "name_or_path": "../../../etc", "_commit_hash": "0" * 40},
    "internals of Python": {"__class__": "x", "__dict__": {}, "__init__": 1, "_resolved_annotations": {}},
    "architectures that are code": {"architectures": [f"{MARK}.system"]},
    "a padding token outside the vocabulary": {"pad_token_id": 10**9, "eos_token_id": [-5, 10**9]},
    "a version that is code": {"transformers_version": f"{MARK}()"},
}


@pytest.mark.parametrize("name", TOLERATED)
def test_tolerated(directory: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a file may not ask for is not done; the model is the right one, with the library's own attention."""
    expected = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "evil.py").write_text(f"{MARK} = open({str(directory / 'ran')!r}, 'w')")
    content = json.dumps({**tiny.values("llama"), **TOLERATED[name]}, ensure_ascii=False)
    (directory / FILE).write_bytes(("\ufeff" if name == "a byte order mark" else "").encode() + content.encode())
    with caplog.at_level(logging.WARNING), watched(directory) as seen:
        model = AutoModelForCausalLM.from_pretrained(directory)
    assert seen == []
    assert not (directory / "ran").exists()
    assert type(model) is LlamaForCausalLM
    assert type(model.config) is type(expected.config)
    assert model.config._attn_implementation == "sdpa"
    assert model.name_or_path == str(directory)
    assert all(tensor.equal(expected.state_dict()[key]) for key, tensor in model.state_dict().items())
    if "attn_implementation" in TOLERATED[name]:
        assert "only a caller can choose it" in caplog.text
    model.save_pretrained(directory.parent / "again")
    saved = json.loads((directory.parent / "again" / FILE).read_text())
    assert not [key for key in saved if key.startswith("_") or key in ("trust_remote_code", "use_kernels")]


def test_sizes_that_no_memory_holds(directory: Path) -> None:
    """Of a configuration alone: known before anything is allocated."""
    sizes = {"hidden_size": 1 << 18, "intermediate_size": 1 << 22, "num_attention_heads": 1 << 10, "head_dim": 256}
    (directory / FILE).write_text(json.dumps({**tiny.values("llama"), **sizes, "num_key_value_heads": 1}))
    found = AutoConfig.from_pretrained(directory)
    with pytest.raises(MemoryLimitError, match=r"there are \d+ bytes of memory in all"):
        AutoModelForCausalLM.from_config(found)


def test_missing_weights_that_no_memory_holds(directory: Path) -> None:
    """Weights that the files lack are not initialised at a size that a file chose."""
    with pytest.raises(MemoryLimitError, match="initialising the"):
        AutoModelForCausalLM.from_pretrained(
            directory, intermediate_size=1 << 22, hidden_size=1 << 20, num_attention_heads=1 << 10,
            num_key_value_heads=1 << 10, vocab_size=1 << 20, ignore_mismatched_sizes=True,
        )  # fmt: skip
