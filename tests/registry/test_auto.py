"""AutoConfig and AutoModelForCausalLM as users know them: arguments, aliases, reports and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from loadstone import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from loadstone.errors import (
    ArgumentError,
    AttentionError,
    ConfigError,
    NotFoundError,
    QuantizationError,
    UnsupportedModelError,
)

kinds = pytest.mark.parametrize("kind", tiny.KINDS)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny.checkpoint(tmp_path / "llama", "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("auto", [AutoConfig, AutoModelForCausalLM])
def test_not_to_be_built(auto: Any) -> None:
    for error in (OSError, TypeError):
        with pytest.raises(error, match=rf"{auto.__name__}\.from_pretrained"):
            auto()


@kinds
def test_from_pretrained(kind: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(tmp_path, kind)
    for place in (tmp_path, str(tmp_path)):
        model = AutoModelForCausalLM.from_pretrained(place)
        assert type(model) is tiny.MODELS[kind]
        assert not model.training
        assert all(p.requires_grad and not p.is_meta for p in model.parameters())
        assert model.name_or_path == model.config.name_or_path == str(tmp_path)
        assert model.config._attn_implementation == "sdpa"
        assert not hasattr(model, "hf_device_map")
        assert all(torch.equal(a, made.state_dict()[n]) for n, a in model.state_dict().items())
    concrete = tiny.MODELS[kind].from_pretrained(tmp_path)
    assert all(torch.equal(a, made.state_dict()[n]) for n, a in concrete.state_dict().items())


@kinds
def test_from_config(kind: str) -> None:
    config = tiny.CONFIGS[kind].from_dict(tiny.values(kind))
    before = config.to_dict()
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is tiny.MODELS[kind]
    assert model.training
    assert model.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.config is not config
    for spelling in ("dtype", "torch_dtype"):
        for value in (torch.bfloat16, "bfloat16"):
            half = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **{spelling: value})
            assert half.dtype == half.config.dtype == torch.bfloat16
            assert half.config._attn_implementation == "eager"
    assert config.to_dict() == before
    assert config._attn_implementation is None
    with pytest.raises(ArgumentError, match="attn_implementation"):
        AutoModelForCausalLM.from_config(config, atn_implementation="eager")
    with pytest.raises(ConfigError, match=r"AutoConfig\.from_pretrained"):
        AutoModelForCausalLM.from_config("somewhere")  # type: ignore[arg-type]


def test_fresh_weights_follow_the_initialisation() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=500, initializer_range=0.05)
    model = AutoModelForCausalLM.from_config(config)
    block = model.transformer.h[0]
    assert float(model.transformer.wte.weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.05, rel=0.05)
    assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(0.05 / 4, rel=0.05)  # 1 / sqrt(2 * 8)
    assert not block.attn.c_attn.bias.any()
    assert bool((block.ln_1.weight == 1).all())
    padded = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(tiny.values("llama", pad_token_id=3)))
    assert not padded.model.embed_tokens.weight[3].any()


def test_a_configuration_object(llama: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    config.use_cache = False
    before = config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(llama, config=config, dtype="bfloat16")
    assert model.config is not config
    assert model.config.use_cache is False
    assert config.to_dict() == before
    with pytest.raises(TypeError, match=r"config\.use_cache"):
        AutoModelForCausalLM.from_pretrained(llama, config=config, use_cache=True)
    with pytest.raises(TypeError, match="use_cahe"):
        AutoModelForCausalLM.from_pretrained(llama, config=config, use_cahe=True)
    # the configuration given decides the class, and must fit the weights
    with pytest.raises((ConfigError, OSError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(llama, config=GPT2Config(n_embd=8, n_head=2, n_layer=1), strict=True)


def test_a_configuration_from_elsewhere(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    LlamaConfig.from_dict(tiny.values("llama", rms_norm_eps=1e-3)).save_pretrained(other)
    (llama / "config.json").unlink()
    for place in (other, str(other), other / "config.json"):
        model = AutoModelForCausalLM.from_pretrained(llama, config=place, use_cache=False)
        assert type(model) is LlamaForCausalLM
        assert model.config.rms_norm_eps == 1e-3
        assert model.config.use_cache is False
        assert model.name_or_path == str(llama)
    with pytest.raises(NotFoundError):
        AutoModelForCausalLM.from_pretrained(llama)


def test_overriding_keywords(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, use_cache=False, rms_norm_eps=0.01, rope_theta=5.0)
    assert model.config.use_cache is False
    assert model.model.norm.variance_epsilon == 0.01
    assert model.config.rope_parameters["rope_theta"] == 5.0
    assert model(torch.tensor([[1, 2]])).past_key_values is None
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        AutoModelForCausalLM.from_pretrained(llama, rms_norm_eps="small")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("atn_implementation", "attn_implementation"), ("torch_dtpye", "torch_dtype"), ("hiden_size", "hidden_size"),
     ("revison", "revision"), ("ignore_mismatched_size", "ignore_mismatched_sizes")],
)  # fmt: skip
def test_unknown_keywords_name_the_nearest(llama: Path, given: str, meant: str) -> None:
    for door in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(TypeError, match=rf"{given!r}; did you mean {meant!r}"):
            door.from_pretrained(llama, **{given: 1})
    with pytest.raises(TypeError, match="keyword"):
        AutoModelForCausalLM.from_pretrained(llama, "positional")


def test_dtype_aliases(llama: Path) -> None:
    for spelling in ("dtype", "torch_dtype"):
        for value in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
            assert AutoModelForCausalLM.from_pretrained(llama, **{spelling: value}).dtype == torch.bfloat16
        assert AutoModelForCausalLM.from_pretrained(llama, **{spelling: "auto"}).dtype == torch.float32
    both = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16, torch_dtype=torch.bfloat16)
    assert both.dtype == torch.float16


def test_loading_info(llama: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(llama, output_loading_info=True)
    empty: set[str] = set()
    assert info == {"missing_keys": empty, "unexpected_keys": empty, "mismatched_keys": empty, "error_msgs": []}
    assert model.load_report.fits
    assert "LlamaForCausalLM" in str(model.load_report)
    model, info = AutoModelForCausalLM.from_pretrained(llama, num_hidden_layers=3, output_loading_info=True)
    assert len(info["missing_keys"]) == 9
    assert all(".2." in name for name in info["missing_keys"])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(OSError, match=r"layers\.2\."):
        AutoModelForCausalLM.from_pretrained(llama, num_hidden_layers=3, strict=True)


def test_attention_is_checked_first(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"unreadable")
    with pytest.raises(AttentionError, match="did you mean 'eager'"):
        AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eagre")
    with pytest.raises(AttentionError, match="available: "):
        AutoModelForCausalLM.from_pretrained(llama, attn_implementation="org/kernel")


def test_output_attentions_in_the_configuration(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, output_attentions=True)
    assert model.config._attn_implementation == "eager"
    assert len(model(torch.tensor([[1, 2]])).attentions) == 2
    with pytest.raises(AttentionError, match="eager"):
        AutoModelForCausalLM.from_pretrained(llama, output_attentions=True, attn_implementation="sdpa")


class _Asked:
    quant_method = "bitsandbytes"


@pytest.mark.parametrize("asked", [{"load_in_4bit": "yes"}, {"quant_method": "new"}, _Asked(), {}, object()])
def test_wrong_quantization_is_refused(llama: Path, asked: Any) -> None:
    with pytest.raises(QuantizationError):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=asked)


def test_null_quantization_is_none(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps(tiny.values("llama", quantization_config=None)))
    assert AutoModelForCausalLM.from_pretrained(llama).load_report.fits


def test_remote_code_is_not_needed_for_known_types(llama: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "org/repo--modeling_x.XForCausalLM"}
    (llama / "config.json").write_text(json.dumps(tiny.values("llama", auto_map=auto_map)))
    for trust in (None, False):
        assert type(AutoModelForCausalLM.from_pretrained(llama, trust_remote_code=trust)) is LlamaForCausalLM


def test_for_model() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=3)
    assert type(config) is GPT2Config
    assert config.n_layer == 3
    with pytest.raises(ConfigError, match="n_layer"):
        AutoConfig.for_model("gpt2", n_layer="3")
    with pytest.raises(UnsupportedModelError):
        AutoConfig.for_model("bert")
    with pytest.raises(UnsupportedModelError):
        AutoConfig.for_model(None)  # type: ignore[arg-type]
