"""`resize_token_embeddings` and what else counts tokens, as transformers has it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity.peers import Case

from loadstone import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig
from loadstone.errors import ArgumentError, QuantizationError

IDS = torch.arange(7)[None]


@tiny.examples(30)
@given(data=st.data())
def test_as_the_peer(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(tiny.KINDS))
    tied = data.draw(st.booleans())
    # more columns than rows, and fewer: the covariance of the latter can be drawn from
    values = {"vocab_size": data.draw(st.sampled_from((20, 61))), "tie_word_embeddings": tied}
    mine, peer = Case(kind, tiny.values(kind, **values), 3).pair()
    size = data.draw(st.one_of(st.none(), st.integers(1, 90)))
    multiple = data.draw(st.one_of(st.none(), st.integers(1, 40)))
    mean = data.draw(st.booleans())
    results = []
    for model in (mine, peer):
        torch.manual_seed(1)
        parameter = model.get_input_embeddings().weight
        returned = model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=mean)
        assert returned is model.get_input_embeddings()
        assert returned.weight is parameter
        results.append(model)
    old = values["vocab_size"]
    for name, ours in mine.state_dict().items():
        theirs = peer.state_dict()[name]
        assert ours.shape == theirs.shape
        changed = name.endswith(("lm_head.weight", "embed_tokens.weight", "wte.weight"))
        assert torch.equal(ours[:old], theirs[:old]) if changed else torch.equal(ours, theirs)
        if mean:  # about which both draw with a deviation of 3e-5 of the rows'
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert mine.config.vocab_size == peer.config.vocab_size == mine.get_input_embeddings().num_embeddings
    assert mine.lm_head.out_features == peer.lm_head.out_features == mine.config.vocab_size
    assert (mine.lm_head.weight is mine.get_input_embeddings().weight) == tied
    assert mine.get_input_embeddings().padding_idx == peer.get_input_embeddings().padding_idx
    if mean and mine.config.vocab_size >= 7:
        with torch.no_grad():
            torch.testing.assert_close(mine(IDS).logits, peer(IDS).logits, rtol=1e-3, atol=1e-3)


def test_new_rows_differ_a_little_and_say_little() -> None:
    model = tiny.model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(80)
        after = model(IDS).logits
    assert torch.equal(after[..., :61], before)
    rows = model.model.embed_tokens.weight[61:]
    assert not torch.equal(rows[0], rows[1])
    torch.testing.assert_close(rows[0], model.model.embed_tokens.weight[:61].mean(0), atol=1e-3, rtol=0)
    small = tiny.model("llama")
    small.config.initializer_range = 0.5
    small.resize_token_embeddings(4000, mean_resizing=False)
    assert float(small.model.embed_tokens.weight[61:].std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_trains_saves_and_loads(kind: str, tmp_path: Any) -> None:
    model = tiny.model(kind)
    model.resize_token_embeddings(70, pad_to_multiple_of=8)
    ids = torch.arange(60, 71)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == 72
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_refused(tmp_path: Any) -> None:
    model = tiny.model("llama", hidden_size=64, intermediate_size=64)
    for wrong in (
        {"new_num_tokens": 0},
        {"new_num_tokens": 2.0},
        {"new_num_tokens": True},
        {"pad_to_multiple_of": "8"},
    ):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            model.resize_token_embeddings(**wrong)
    model.save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, device_map="cpu")
    if quantized.lm_head.weight.dtype != torch.uint8:
        from loadstone import Linear4bit

        quantized.lm_head = Linear4bit.from_linear(quantized.lm_head)
    with pytest.raises(QuantizationError, match="head"):
        quantized.resize_token_embeddings(70)
    usual = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    assert usual.resize_token_embeddings(70).num_embeddings == usual.lm_head.out_features == 70
    model.add_adapter(LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ArgumentError, match="merge_and_unload"):
        model.resize_token_embeddings(70)
    from loadstone.models.pretrained import build_on_meta

    with pytest.raises(ArgumentError, match="meta"):
        build_on_meta(type(usual), tiny.model("llama").config).resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == 61


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_accessors(kind: str) -> None:
    mine, peer = Case(kind, tiny.values(kind), 1).pair()
    for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
        assert mine.num_parameters(**options) == peer.num_parameters(**options)
    assert (
        mine.estimate_tokens({"input_ids": IDS}) == mine.estimate_tokens({"inputs_embeds": torch.zeros(1, 7, 4)}) == 7
    )
    assert mine.estimate_tokens({}) == 0
    assert mine.floating_point_ops({"input_ids": IDS}) == 42 * peer.num_parameters(exclude_embeddings=True)
    assert mine.dtype == peer.dtype == torch.float32
    assert mine.device == peer.device
    assert mine.get_decoder() is mine.base_model
    decoder = tiny.model(kind, seed=9).base_model
    mine.set_decoder(decoder)
    assert mine.base_model is decoder
    assert mine.lm_head.weight is not decoder.get_input_embeddings().weight or mine.config.tie_word_embeddings
    for name in ("is_parallelizable", "model_parallel", "main_input_name", "supports_gradient_checkpointing"):
        assert getattr(mine, name) == getattr(peer, name, False)
