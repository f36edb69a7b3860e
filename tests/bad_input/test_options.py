"""generation_config.json, quantization_config and adapters of strangers."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bad_input.inputs import MARK, Case, case, config, good, put, refused, snapshot, table, watched, write
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from loadstone import AutoModelForCausalLM, LoraConfig
from loadstone.errors import (
    ArgumentError,
    ConfigError,
    FormatError,
    MemoryLimitError,
    MissingWeightsError,
    NotFoundError,
    PathError,
    QuantizationError,
    ShapeMismatchError,
    UnexpectedWeightsError,
    UnsafeFormatError,
)
from loadstone.models.adapters.patterns import linear_pattern

GENERATION, ADAPTER, MATRICES = "generation_config.json", "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return put(tmp_path / "checkpoint", good())


# Generation


def option(name: str, value: Any) -> Case:
    return case(write(GENERATION, {name: value}), ConfigError, GENERATION, name)


GENERATIONS = {
    "not JSON": case(write(GENERATION, b"{max_length: 3}"), ConfigError, GENERATION, "not valid JSON"),
    "a list": case(write(GENERATION, b"[]"), ConfigError, GENERATION, "must hold a JSON object"),
    "NaN": case(write(GENERATION, b'{"temperature": NaN}'), ConfigError, GENERATION, "NaN is not JSON"),
    "a key twice": case(write(GENERATION, b'{"top_k": 1, "top_k": 2}'), ConfigError, GENERATION, "is there twice"),
    "nested deep": case(write(GENERATION, b'{"a":' * 100_000), ConfigError, GENERATION, "nested too deep"),
    "over four megabytes": case(write(GENERATION, b" " * (5 << 20)), ConfigError, GENERATION, "at most"),
    "a length of nothing": option("max_length", 0),
    "a length below zero": option("max_new_tokens", -1),
    "a length that is a fraction": option("max_new_tokens", 2.5),
    "a length that is true": option("max_length", True),
    "a length of a hundred bits": option("max_length", 1 << 100),
    "a billion beams": option("num_beams", 10**9),
    "a billion sequences": option("num_return_sequences", 10**9),
    "a temperature below zero": option("temperature", -1),
    "a temperature that is a text": option("temperature", "hot"),
    "a top_p above one": option("top_p", 1.5),
    "a penalty of zero": option("repetition_penalty", 0),
    "a penalty of 10^400": case(
        write(GENERATION, {"length_penalty": 10**400}), ConfigError, GENERATION, "whole number of"
    ),
    "do_sample a text": option("do_sample", "yes"),
    "bad words that are no lists": option("bad_words_ids", [1]),
    "an end that is a text": option("eos_token_id", "</s>"),
    "an end of a hundred bits": option("eos_token_id", [1 << 100]),
    "stop strings that are numbers": option("stop_strings", [1]),
}


@table(GENERATIONS)
def test_generation_refused(directory: Path, row: Case) -> None:
    refused(directory, row, AutoModelForCausalLM.from_pretrained)


def test_generation_options_that_name_code_are_kept_and_not_run(directory: Path) -> None:
    asks = {
        "custom_generate": f"evil/{MARK}",
        "assistant_model": "evil/model",
        "_from_model_config": True,
        "x": {"y": 1},
    }
    (directory / GENERATION).write_text(json.dumps({**asks, "max_new_tokens": 2, "do_sample": False}))
    with watched(directory) as seen:
        model = AutoModelForCausalLM.from_pretrained(directory)
        tokens = model.generate(torch.tensor([[1, 2]]), pad_token_id=0)
    assert seen == []
    assert tokens.shape[1] <= 4
    assert "_from_model_config" not in model.generation_config.to_dict()


@pytest.mark.parametrize(
    "options",
    [{"max_length": 1 << 62}, {"max_length": 1 << 31, "cache_implementation": "static"}],
    ids=["long", "static"],
)
def test_lengths_that_no_memory_holds(directory: Path, options: dict[str, Any]) -> None:
    (directory / GENERATION).write_text(json.dumps(options))
    model = AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(MemoryLimitError, match="sequences of up to"):
        model.generate(torch.tensor([[1, 2]]))


def test_a_tokenizer_that_cannot_tokenize(tmp_path: Path) -> None:
    from loadstone.loading.source import resolve_source
    from loadstone.models.tokenizer import load_tokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    found = load_tokenizer(resolve_source(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot tokenize"):
        found.encode("b")
    with open(tmp_path / "tokenizer.json", "r+b") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(ConfigError, match="a tokenizer is at most"):
        load_tokenizer(resolve_source(tmp_path))


# Quantization


def quantized(**values: Any) -> Callable[[Path], object]:
    return config(quantization_config=values)


def quant(spoil: Callable[[Path], object], *words: str) -> Case:
    return case(spoil, QuantizationError, *words)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
QUANTIZATIONS = {
    "an unknown method": quant(quantized(quant_method="evil"), "'evil'", "which is not known"),
    "a misspelled method": quant(quantized(quant_method="gtpq"), "did you mean 'gptq'"),
    "a method that is code": quant(quantized(quant_method=f"{MARK}:system", bits=4), "which is not known"),
    "a method that is a number": quant(quantized(quant_method=4), "which is not known"),
    "a method that is a list": quant(quantized(quant_method=["gptq"]), "which is not known"),
    "no method": quant(quantized(bits=4), "names no quant_method"),
    "an empty object": quant(config(quantization_config={}), "names no quant_method"),
    "a list": quant(config(quantization_config=[]), "quantization_config"),
    "a text": quant(config(quantization_config="nf4"), "quantization_config"),
    "true": quant(config(quantization_config=True), "quantization_config"),
    "neither four bits nor eight": quant(quantized(quant_method="bitsandbytes"), "chooses no bits"),
    "four bits and eight": quant(quantized(**NF4, load_in_8bit=True), "are both True"),
    "bits that are a number": quant(quantized(quant_method="bitsandbytes", load_in_4bit=1), "load_in_4bit"),
    "flags that contradict": quant(quantized(**NF4, _load_in_4bit=False), "contradicts"),
    "an unknown code": quant(quantized(**{**NF4, "bnb_4bit_quant_type": "nf5"}), "bnb_4bit_quant_type"),
    "a code that is a list": quant(quantized(**{**NF4, "bnb_4bit_quant_type": ["nf4"]}), "bnb_4bit_quant_type"),
    "a compute dtype that is code": quant(quantized(**NF4, bnb_4bit_compute_dtype="torch.load"), "compute_dtype"),
    "a storage dtype that is a number": quant(quantized(**NF4, bnb_4bit_quant_storage=8), "quant_storage"),
    "a threshold below zero": quant(quantized(**NF4, llm_int8_threshold=-1), "llm_int8_threshold"),
    "names to skip that are a text": quant(quantized(**NF4, llm_int8_skip_modules="lm_head"), "skip_modules"),
    "names to skip that explode": quant(quantized(**NF4, llm_int8_skip_modules=["(a+)+$"]), "regular expressions"),
    "names to skip with many stars": quant(quantized(**NF4, llm_int8_skip_modules=["*a" * 20]), "regular expressions"),
    "gptq of 5 bits": quant(quantized(**{**GPTQ, "bits": 5}), "bits"),
    "gptq of true bits": quant(quantized(**{**GPTQ, "bits": True}), "bits"),
    "gptq in groups of zero": quant(quantized(**{**GPTQ, "group_size": 0}), "group_size"),
    "gptq in groups of a hundred bits": quant(quantized(**{**GPTQ, "group_size": 1 << 100}), "group_size"),
    "gptq for a kernel": quant(quantized(**GPTQ, checkpoint_format="marlin"), "marlin"),
    "gptq with options by name": quant(quantized(**GPTQ, dynamic={"-:.*": {}}), "dynamic"),
    "awq of 8 bits": quant(quantized(quant_method="awq", bits=8, group_size=32), "bits"),
    "awq in another layout": quant(quantized(quant_method="awq", bits=4, group_size=32, version="gemv"), "gemv"),
    "an unknown field of weight_only": quant(
        quantized(quant_method="weight_only", kernel=MARK), "unknown field 'kernel'"
    ),
}
PACKED_THAT_ARE_NOT = {
    "nf4 codes that are not there": case(quantized(**NF4), FormatError, "cannot become the uint8"),
    "gptq codes that are not there": case(quantized(**GPTQ), MissingWeightsError, "qweight"),
}


@table(QUANTIZATIONS)
def test_quantization_refused(directory: Path, row: Case) -> None:
    refused(directory, row, AutoModelForCausalLM.from_pretrained)


@table(PACKED_THAT_ARE_NOT)
def test_codes_are_not_made_up(directory: Path, row: Case) -> None:
    refused(directory, row, AutoModelForCausalLM.from_pretrained)


# Adapters

TARGET = "base_model.model.model.layers.0.self_attn.q_proj"
LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}


@lru_cache(maxsize=1)
def matrices() -> bytes:
    return save({f"{TARGET}.lora_A.weight": torch.ones(3, 32), f"{TARGET}.lora_B.weight": torch.ones(32, 3)})


def lora(**changes: Any) -> Callable[[Path], object]:
    values = {**LORA, **changes}
    return write(ADAPTER, {name: value for name, value in values.items() if value is not ...})


def with_matrices(**changes: Any) -> Callable[[Path], object]:
    """The matrices changed by key; with ``...`` left out."""
    held: dict[str, Any] = {**load(matrices()), **changes}
    return write(MATRICES, save({name: tensor for name, tensor in held.items() if tensor is not ...}))


A, B = f"{TARGET}.lora_A.weight", f"{TARGET}.lora_B.weight"
ADAPTERS = {
    "not JSON": case(write(ADAPTER, b"{"), ConfigError, ADAPTER, "not valid JSON"),
    "a list": case(write(ADAPTER, b"[]"), ConfigError, ADAPTER, "must be an object"),
    "a key twice": case(write(ADAPTER, b'{"r": 1, "r": 2}'), ConfigError, ADAPTER, "is there twice"),
    "nested deep": case(write(ADAPTER, b"[" * 100_000), ConfigError, ADAPTER, "nested too deep"),
    "over a megabyte": case(write(ADAPTER, b" " * (1 << 21)), ConfigError, ADAPTER, "is at most"),
    "another method": case(lora(peft_type="IA3"), ConfigError, ADAPTER, "only 'LORA'"),
    "no method": case(lora(peft_type=...), ConfigError, "only 'LORA'"),
    "a rank of 10^9": case(lora(r=10**9), ConfigError, "r must be a whole number from 1 to 65536"),
    "a rank of zero": case(lora(r=0), ConfigError, "r must be"),
    "a rank that is true": case(lora(r=True), ConfigError, "r must be"),
    "a rank that is a text": case(lora(r="3"), ConfigError, "r must be"),
    "an alpha of 10^300": case(lora(lora_alpha=10**300), ConfigError, "lora_alpha"),
    "an alpha that is a text": case(lora(lora_alpha="6"), ConfigError, "lora_alpha"),
    "a dropout of one": case(lora(lora_dropout=1), ConfigError, "lora_dropout"),
    "targets that are a number": case(lora(target_modules=3), ConfigError, "target_modules"),
    "targets that are numbers": case(lora(target_modules=[3]), ConfigError, "target_modules"),
    "a start that is code": case(lora(init_lora_weights=f"{MARK}()"), ConfigError, "init_lora_weights"),
    "a field that asks for more": case(lora(use_dora=True), ConfigError, "use_dora"),
    "code for the base": case(lora(auto_mapping={"base_model_class": MARK}, revision=3), ConfigError, "revision"),
    "no weights": case(lambda place: (place / MATRICES).unlink(), NotFoundError, MATRICES),
    "weights cut off": case(write(MATRICES, matrices()[:-1]), FormatError, MATRICES, "truncated"),
    "weights of another rank": case(lora(r=4), ShapeMismatchError, "lora_A", "rank 4"),
    "one matrix of a pair": case(with_matrices(**{B: ...}), MissingWeightsError, "no lora_B"),
    "no matrices": case(with_matrices(**{A: ..., B: ...}), MissingWeightsError, "holds no tensors"),
    "matrices of integers": case(with_matrices(**{A: torch.ones(3, 32, dtype=torch.int64)}), UnexpectedWeightsError, A),
    "matrices for a layer that is not there": case(
        with_matrices(**{A.replace("layers.0", "layers.7"): torch.ones(3, 32)}), UnexpectedWeightsError, "layers.7"
    ),
    "the base's own weights": case(
        with_matrices(**{"model.norm.weight": torch.zeros(32)}), UnexpectedWeightsError, "model.norm.weight"
    ),
}


def pickled(directory: Path) -> None:
    (directory / MATRICES).unlink()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04.")


def linked_out(directory: Path) -> None:
    outside = directory.parent / "outside"
    outside.mkdir()
    (directory / MATRICES).rename(outside / MATRICES)
    (directory / MATRICES).symlink_to(outside / MATRICES)


ADAPTERS["pickled weights"] = case(pickled, UnsafeFormatError, "adapter_model.bin", "can run code")
ADAPTERS["weights that link out"] = case(linked_out, PathError, MATRICES, "out of it")


@table(ADAPTERS)
def test_adapter_refused(tmp_path: Path, row: Case) -> None:
    """The model is as it was, to the bit."""
    place = put(tmp_path / "adapter", {ADAPTER: json.dumps(LORA).encode(), MATRICES: matrices()})
    model = tiny.model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused(place, row, lambda where: model.load_adapter(where))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.adapters


def test_a_regular_expression_of_a_file_is_not_run(tmp_path: Path) -> None:
    """Which layers have matrices is what the weights say."""
    place = put(tmp_path / "adapter", {MATRICES: matrices()})
    lora(target_modules=r"(.*.*)*\1!")(place)
    model = tiny.model("llama")
    model.load_adapter(place)
    with pytest.raises(ConfigError, match="for ever"):
        tiny.model("llama").add_adapter(LoraConfig(target_modules=r"(.*.*)*!"))


BOMBS = [
    r"(a+)+$",
    r"(a|a)*b",
    r"((a)?)*x",
    r"(\w+\.?)+!",
    r"(?:[a-z]*){3,}q",
    r"(.*)\1",
    ".*a" * 9,
    "x" * 3000,
    "(" * 3000,
]
TAME = [r".*\.(q_proj|v_proj)", r"model\.layers\.[0-9]+\.self_attn\.[qkvo]_proj", r".*(mlp|attn).*(up|down)_proj$"]


@pytest.mark.parametrize("pattern", BOMBS, ids=range(len(BOMBS)))
def test_bombs_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        linear_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", TAME)
def test_usual_expressions_are_taken(pattern: str) -> None:
    assert linear_pattern(pattern, "x").pattern == pattern


MATCHER = """
import re, sys
for line in sys.stdin:
    re.compile(line.rstrip("\\n")).fullmatch("a" * 44 + "!")  # fails at its end, where exponential ones try 2**43 ways
    print("done", flush=True)
"""


class Matcher:
    """A process that matches, as nothing else can end a match that goes on for days."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MATCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def comes_to_an_end(self, pattern: str, seconds: float) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(pattern + "\n")
        self.process.stdin.flush()
        return bool(select.select([self.process.stdout], [], [], seconds)[0]) and bool(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def matcher() -> Iterator[Matcher]:
    made = Matcher()
    yield made
    made.end()


def repeated(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    times = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])
    return st.one_of(
        st.builds("({}){}".format, inner, times),
        st.builds("({}|{}){}".format, inner, inner, times),
        st.builds("{}{}".format, inner, inner),
    )


EXPRESSIONS = st.recursive(st.sampled_from(["a", "b", ".", "[ab]", "a+", "a*", "a?"]), repeated, max_leaves=6)


@settings(tiny.examples(300), phases=[Phase.explicit, Phase.generate])  # each try of a failure costs the whole wait
@given(EXPRESSIONS | st.text("ab.*+?()[]|{}1,\\^$", max_size=14))
@example("(a+)+").via("what the guard is for")
@example("(a|a)*").via("and this")
def test_what_is_taken_is_quick(matcher: Matcher, pattern: str) -> None:
    """Matching what fails at the end: steps are bounded for every pattern that is taken."""
    try:
        linear_pattern(pattern, "x")
    except ConfigError:
        return
    assert matcher.comes_to_an_end(pattern, 120)


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*", r"(\w+\.?)+"])
def test_what_is_not_taken_would_never_end(pattern: str) -> None:
    """The check of the check."""
    matcher = Matcher()
    try:
        assert matcher.comes_to_an_end("a*", 120)
        assert not matcher.comes_to_an_end(pattern, 1)
    finally:
        matcher.end()


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a.b", "x" * 65, "a\0", 3, None, "\x1b[2J"])
def test_adapter_names_that_are_no_names(tmp_path: Path, name: Any) -> None:
    place = put(tmp_path / "adapter", {ADAPTER: json.dumps(LORA).encode(), MATRICES: matrices()})
    model = tiny.model("llama")
    with pytest.raises(ArgumentError, match="an adapter's name"):
        model.load_adapter(place, adapter_name=name)
    assert not model.adapters
    assert not [key for key in model.state_dict() if "lora" in key]


def test_a_base_that_the_adapter_names(tmp_path: Path) -> None:
    """Something that is no checkpoint, or the adapter itself, is an error; nothing is opened there."""
    place = put(tmp_path / "adapter", {ADAPTER: json.dumps(LORA).encode(), MATRICES: matrices()})
    for base, error in (
        (str(tmp_path), ConfigError),
        (str(place), ConfigError),
        ("/none/x", NotFoundError),
        (None, ConfigError),
    ):
        lora(base_model_name_or_path=base)(place)
        before = snapshot(tmp_path)
        with pytest.raises(error), watched(tmp_path) as seen:
            AutoModelForCausalLM.from_pretrained(place)
        assert seen == []
        assert snapshot(tmp_path) == before
