"""examples/custom_architecture.py: an architecture from outside does all that a built-in one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from examples.script import load
from loadstone import AutoConfig, AutoModelForCausalLM, list_architectures
from loadstone.errors import ConfigError

qwen2 = load("custom_architecture")
VALUES = {**tiny.values("llama"), "model_type": "qwen2", "num_hidden_layers": 3}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def model(attn_implementation: str = "sdpa", **overrides: Any) -> Any:
    config = qwen2.Qwen2Config.from_dict({**VALUES, **overrides}, attn_implementation=attn_implementation)
    built = AutoModelForCausalLM.from_config(config).eval()
    tiny.randomize(built)
    return built


def test_it_is_registered_under_its_name() -> None:
    (row,) = list_architectures("qwen2")
    assert row.model_class() is qwen2.Qwen2ForCausalLM


@pytest.mark.parametrize("tied", [False, True])
def test_its_checkpoint_loads_by_name(tmp_path: Path, tied: bool) -> None:
    saved = model(tie_word_embeddings=tied, **WINDOWED)
    saved.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is qwen2.Qwen2ForCausalLM
    assert not any(info.values())
    assert AutoConfig.from_pretrained(tmp_path) == loaded.config
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(ids).logits, saved(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("overrides", [{}, WINDOWED])
def test_generation_with_cache_equals_generation_without(overrides: dict[str, Any]) -> None:
    built = model(**overrides)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    options = {"max_new_tokens": 12, "eos_token_id": None}
    assert torch.equal(built.generate(ids, **options), built.generate(ids, use_cache=False, **options))


def test_only_the_later_layers_have_a_window() -> None:
    config = model(**WINDOWED).config
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert model().config.sliding_window is None
    with pytest.raises(ConfigError, match="max_window_layers"):
        qwen2.Qwen2Config.from_dict({**VALUES, "max_window_layers": "all"})


def test_backends_agree_and_it_trains() -> None:
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    eager, sdpa = model("eager", **WINDOWED), model("sdpa", **WINDOWED)
    torch.testing.assert_close(eager(ids).logits, sdpa(ids).logits, rtol=1e-4, atol=1e-4)
    sdpa.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in sdpa.parameters())


def test_the_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    qwen2.main([])
    assert "Qwen2ForCausalLM" in capsys.readouterr().out
