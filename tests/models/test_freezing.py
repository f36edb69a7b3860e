"""Freezing by pattern."""

from __future__ import annotations

import pytest
import tiny
import torch

from loadstone.errors import ArgumentError, QuantizationError

IDS = torch.arange(9)[None]


def test_frozen_parameters_stay_and_the_others_learn() -> None:
    model = tiny.model("llama", tie_word_embeddings=False).train()
    names = model.freeze("embed_tokens", r"layers\.0\.")
    assert "model.embed_tokens.weight" in names
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(names)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in names), name
    assert model.unfreeze(r"layers\.0\.mlp") == sorted(n for n in names if "layers.0.mlp" in n)
    assert set(model.unfreeze()) == set(before)
    assert model.num_parameters(only_trainable=True) == model.num_parameters()


def test_a_tied_parameter_goes_by_each_name() -> None:
    model = tiny.model("gpt2")
    assert model.freeze("lm_head") == ["lm_head.weight"]
    assert not model.transformer.wte.weight.requires_grad


def test_refused() -> None:
    model = tiny.model("llama")
    with pytest.raises(ArgumentError, match="embed_tokens"):
        model.freeze("norm", "model.embed_token.weight")
    with pytest.raises(ArgumentError, match="regular expression"):
        model.freeze("(")
    assert all(p.requires_grad for p in model.parameters())  # also of the first pattern, which fits


def test_codes_cannot_be_trained() -> None:
    from loadstone import BitsAndBytesConfig
    from loadstone.quant import find_quantizer

    model = tiny.model("llama", hidden_size=64, intermediate_size=64)
    from loadstone.quant.linear import Linear4bit

    model.model.layers[0].mlp.up_proj = Linear4bit.from_linear(model.model.layers[0].mlp.up_proj)
    config = BitsAndBytesConfig(load_in_4bit=True)
    model.set_quantizer(find_quantizer("tiny", None, config))
    with pytest.raises(QuantizationError, match="no gradient"):
        model.unfreeze()
    assert model.unfreeze("input_layernorm") == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    ]
    model.freeze()
