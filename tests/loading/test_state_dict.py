"""``state_dict=``: weights in memory are planned and checked as those of files are, and not copied without need."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import peak_memory
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone import AutoModelForCausalLM, LlamaForCausalLM
from loadstone.errors import (
    ArgumentError,
    CheckpointError,
    FormatError,
    MissingWeightsError,
    ShapeMismatchError,
    UnexpectedWeightsError,
)


def load(model: Any, state: Any, **options: Any) -> Any:
    """As transformers users write it: no name, a configuration and the weights."""
    return AutoModelForCausalLM.from_pretrained(None, config=model.config, state_dict=state, **options)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_the_models_own(kind: str, tied: bool) -> None:
    model = tiny.model(kind, tie_word_embeddings=tied)
    state = model.state_dict()
    loaded = load(model, state, strict=True)
    for name, tensor in loaded.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr(), name
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, load(model, dict(state))(ids).logits)
    assert type(loaded.config) is type(model.config)
    assert loaded.config is not model.config


@tiny.examples(30)
@given(
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16, torch.float64)),
    asked=st.sampled_from((None, torch.float32, torch.bfloat16)),
    layout=st.sampled_from(("rows", "columns", "part")),
    wrap=st.sampled_from((dict, UserDict)),
    tied=st.booleans(),
)
def test_casts_and_layouts(dtype: torch.dtype, asked: torch.dtype | None, layout: str, wrap: Any, tied: bool) -> None:
    model = tiny.model("llama", tie_word_embeddings=tied).to(dtype)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # ties are two tensors now, equal
    if layout == "columns":
        state = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in state.items()}
    elif layout == "part":
        state = {name: torch.cat([t, t])[: len(t)] for name, t in state.items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.config.dtype = None
    loaded = load(model, wrap(state), dtype=asked, strict=True)
    wanted = asked or dtype
    for name, tensor in before.items():
        got = loaded.state_dict()[name]
        assert got.dtype == wanted
        assert torch.equal(got, tensor.to(wanted)), name
        shares = got.data_ptr() == state[name].data_ptr()
        assert shares == (wanted == dtype and not (tied and name == "lm_head.weight")), name
        assert torch.equal(state[name], tensor), "the caller's tensors are as they were"
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_with_a_name_its_configuration_counts_and_its_weights_do_not(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path, "llama")
    other = tiny.model("llama", seed=5).state_dict()
    (tmp_path / "model.safetensors").unlink()
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        loaded = cls.from_pretrained(tmp_path, state_dict=other)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in other.items())
        assert loaded.name_or_path == str(tmp_path)


def test_missing_unexpected_and_mismatched() -> None:
    model = tiny.model("llama")
    state = dict(model.state_dict())
    del state["model.norm.weight"]
    state["extra"] = torch.ones(3)
    loaded, info = load(model, state, output_loading_info=True)
    assert info["missing_keys"] == {"model.norm.weight"}
    assert info["unexpected_keys"] == {"extra"}
    assert torch.equal(loaded.model.norm.weight, torch.ones(32))
    with pytest.raises(MissingWeightsError, match=r"model\.norm\.weight"):
        load(model, state, strict=True)
    with pytest.raises(UnexpectedWeightsError, match="extra"):
        load(model, {**model.state_dict(), "extra": torch.ones(3)}, strict=True)
    wrong = {**model.state_dict(), "lm_head.weight": torch.ones(7, 32)}
    with pytest.raises(ShapeMismatchError, match=r"lm_head\.weight.*state_dict.*\(7, 32\)"):
        load(model, wrong)
    load(model, wrong, ignore_mismatched_sizes=True)
    with pytest.raises(FormatError, match="int64"):
        load(model, {**model.state_dict(), "lm_head.weight": torch.ones(61, 32, dtype=torch.int64)})
    base = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}  # of the decoder alone
    assert load(model, base).load_report.fits
    renamed = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    assert load(model, renamed, key_mapping={r"^net\.": ""}).load_report.fits


def test_ties_that_differ_are_kept_apart(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("llama", tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    loaded = load(model, state)
    assert "different values" in caplog.text
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_quantized(tmp_path: Path, method: dict[str, Any]) -> None:
    model = tiny.checkpoint(tmp_path, "llama", hidden_size=64, intermediate_size=128)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=method)
    loaded = load(model, model.state_dict(), quantization_config=method)
    codes = wanted.state_dict()
    assert loaded.state_dict().keys() == codes.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in codes.items())
    again = AutoModelForCausalLM.from_pretrained(None, config=wanted.config, state_dict=codes)  # packed already
    assert again.is_quantized
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, wanted(ids).logits)


def test_devices() -> None:
    model = tiny.model("llama")
    loaded = load(model, model.state_dict(), device_map="meta")
    assert loaded.lm_head.weight.is_meta
    loaded = load(model, model.state_dict(), device_map="cpu")
    assert loaded.hf_device_map == {"": "cpu"} or set(map(str, loaded.hf_device_map.values())) == {"cpu"}


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([1], ArgumentError, "list"),
    "a path": ("weights.bin", ArgumentError, "directory"),
    "a number as a name": ({1: torch.ones(1)}, ArgumentError, "int"),
    "a number": ({"w": 1.0}, ArgumentError, "float"),
    "an array": ({"w": torch.ones(2).numpy()}, ArgumentError, "ndarray"),
    "on meta": ({"w": torch.ones(2, device="meta")}, CheckpointError, "meta"),
    "sparse": ({"w": torch.eye(2).to_sparse()}, CheckpointError, "to_dense"),
    "quantized": ({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, CheckpointError, "dequantize"),
    "complex double": ({"w": torch.ones(2, dtype=torch.complex128)}, CheckpointError, "complex128"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_state_dict(case: str) -> None:
    state, kind, word = BAD[case]
    with pytest.raises(kind, match=word):
        load(tiny.model("llama"), state)


def test_subclasses_are_not_taken_for_tensors() -> None:
    class Odd(torch.Tensor):
        pass

    model = tiny.model("llama")
    with pytest.raises(CheckpointError, match="Odd"):
        load(model, {**model.state_dict(), "lm_head.weight": torch.ones(61, 32).as_subclass(Odd)})


def test_arguments_that_contradict(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path, "llama")
    state = model.state_dict()
    for arguments in ({}, {"config": model.config}, {"state_dict": state}, {"config": str(tmp_path)}):
        with pytest.raises(ArgumentError, match="config="):
            AutoModelForCausalLM.from_pretrained(None, **arguments)
        with pytest.raises(ArgumentError, match="config="):
            LlamaForCausalLM.from_pretrained(None, **arguments)
    with pytest.raises(ArgumentError, match="variant"):
        AutoModelForCausalLM.from_pretrained(tmp_path, state_dict=state, variant="fp16")


@pytest.mark.skipif(not peak_memory.AVAILABLE, reason="needs /proc")
def test_memory() -> None:
    """Sharing costs nothing; a cast costs its result."""
    setup = """
from loadstone import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import torch
def make(width):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 8 * width}
    config = LlamaConfig(num_attention_heads=8, num_hidden_layers=3, **sizes)
    return config, LlamaForCausalLM(config).state_dict()
config, state = make(32)
AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype="bfloat16")
config, state = make(1024)
"""
    load = "AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=state{})"
    size = 2 * 64e6
    assert peak_memory.peak_of(f"model = {load.format('')}", setup) < 24e6
    assert peak_memory.peak_of(f"model = {load.format(', dtype=torch.bfloat16')}", setup) < size + 48e6
