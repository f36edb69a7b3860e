"""attn_implementation="flash_attention_2" and kernels="triton" in whole models, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone import AutoModelForCausalLM, DynamicCache, Kernels, StaticCache
from loadstone.errors import AttentionError, KernelError
from loadstone.kernels import support

pytestmark = pytest.mark.skipif(not support.interpreting(), reason="for Triton's interpreter; tests/gpu has the GPU's")
kinds = pytest.mark.parametrize("kind", tiny.KINDS)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def options(kind: str) -> dict[str, Any]:
    """Without GPT-2's dropout, so that training is deterministic."""
    return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}


def fused(kind: str, seed: int = 0, **overrides: Any) -> Any:
    """A small model that runs everything in Triton."""
    model = tiny.model(kind, seed, "flash_attention_2", **{**options(kind), **overrides})
    model.set_kernels("triton")
    return model


def gradients(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@kinds
@tiny.examples(6)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_logits_and_gradients(kind: str, data: st.DataObject, seed: int) -> None:
    """Padded on either side, packed or plain: equal to the reference, logits and every gradient."""
    ids = tokens(seed, 2, data.draw(st.integers(2, 20)))
    inputs: dict[str, Any] = {}
    form = data.draw(st.sampled_from(("plain", "left", "right", "holes", "packed")))
    kept = torch.ones_like(ids)
    if form == "left":
        kept[0, : data.draw(st.integers(0, ids.shape[1] - 1))] = 0
    elif form == "right":
        kept[1, data.draw(st.integers(1, ids.shape[1])) :] = 0
    elif form == "holes":
        kept = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.7).long()
        kept[:, 0] = 1
    if form == "packed":
        cut = data.draw(st.integers(1, ids.shape[1] - 1))
        inputs["position_ids"] = torch.cat((torch.arange(cut), torch.arange(ids.shape[1] - cut)))[None]
    elif form != "plain":
        inputs["attention_mask"] = kept
    mine, reference = fused(kind, seed), tiny.model(kind, seed, **options(kind))
    with torch.no_grad():
        ours, theirs = mine(ids, **inputs).logits, reference(ids, **inputs).logits
    seen = kept.bool() if form != "left" else kept.bool() & (kept.cumsum(-1) > 0)
    assert torch.isfinite(ours).all()
    assert torch.allclose(ours[seen], theirs[seen], **CLOSE)
    labels = ids.masked_fill(~seen | ~seen.roll(1, -1), -100)  # what padding predicts is anything
    for model in (mine, reference):
        model.train()
        model.zero_grad()
        model(ids, labels=labels, **inputs).loss.backward()
    for (name, ours), theirs in zip(mine.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4), name


@kinds
@pytest.mark.parametrize("cache", [DynamicCache, lambda config: StaticCache(config, 40)])
def test_decoding(kind: str, cache: Any) -> None:
    """A padded prompt and then token by token, the decode kernel on either cache."""
    mine, reference = fused(kind, 3), tiny.model(kind, 3)
    ids = tokens(1, 2, 22)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    held = cache(mine.config)
    with torch.no_grad():
        theirs = reference(ids, attention_mask=mask, position_ids=positions).logits
        at = 0
        for count in (15, 1, 2, 1, 1, 1, 1):
            now = slice(at, at + count)
            at += count
            ours = mine(
                ids[:, now], attention_mask=mask[:, :at], position_ids=positions[:, now], past_key_values=held
            ).logits
            kept = mask[:, now].bool()
            assert torch.allclose(ours[kept], theirs[:, now][kept], **CLOSE)


@kinds
def test_generate(kind: str) -> None:
    mine, reference = fused(kind, 5), tiny.model(kind, 5)
    ids = tokens(2, 2, 6)
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(mine.generate(ids, **greedy), reference.generate(ids, **greedy))


def test_checkpointing_with_dropout_repeats_the_same_weights() -> None:
    """The recomputed forward drops what the first dropped: gradients equal those without checkpointing."""
    ids = tokens(3, 2, 12)
    model = fused("llama", 7, attention_dropout=0.3).train()
    torch.manual_seed(0)
    _, plain = gradients(model, ids)
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    _, again = gradients(model, ids)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    torch.manual_seed(1)
    _, other = gradients(model, ids)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


@kinds
def test_compiles_in_training(kind: str) -> None:
    ids = tokens(4, 2, 10)
    model = fused(kind, 9).train()
    eager, expected = gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    assert torch.allclose(loss, eager, rtol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-6), name


def test_what_flash_cannot_do_says_so() -> None:
    model = fused("llama")
    ids = tokens(0, 1, 4)
    with pytest.raises(AttentionError, match="eager"):
        model(ids, output_attentions=True)
    with pytest.raises(AttentionError, match="sdpa"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(KernelError, match="float64"):
        model.double()(ids)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Asking for Triton by name where it cannot run is an error before anything is built; auto is torch."""
    tiny.checkpoint(tmp_path, "llama")
    model = fused("llama")
    monkeypatch.setattr(support, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("flash_attention_2", "flash"):
        with pytest.raises(AttentionError, match="no GPU"):
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    for selection in ("triton", {"rms_norm": "triton"}):
        with pytest.raises(KernelError, match="auto"):
            AutoModelForCausalLM.from_pretrained(tmp_path, kernels=selection)
    with pytest.raises(KernelError, match="rms_norm"):
        model(tokens(0, 1, 4))
    model.set_kernels("auto")
    with pytest.raises(AttentionError, match="sdpa"):
        model(tokens(0, 1, 4))
    model.set_attn_implementation("sdpa")
    assert model(tokens(0, 1, 4)).logits.shape == (1, 4, 61)
    assert set(model.kernel_report().values()) - {"native"} == {"torch", "sdpa"}


def test_kernels_at_load(tmp_path: Any) -> None:
    expected = tiny.checkpoint(tmp_path, "llama").eval()
    ids = tokens(0, 1, 5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, kernels="triton")
    assert model.config._attn_implementation == "flash_attention_2"
    assert set(model.kernel_report().values()) == {"triton", "flash_attention_2"}
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected(ids).logits, **CLOSE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, kernels={"rms_norm": "triton"}, attn_implementation="eager")
    report = model.kernel_report()
    assert report["rms_norm"] == "triton"
    assert report["gated"] == "torch"
    built = AutoModelForCausalLM.from_config(model.config, kernels=Kernels("torch"))
    assert built.kernel_report()["rms_norm"] == "torch"
    with pytest.raises(KernelError, match="did you mean 'triton'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, kernels="tritn")
    with pytest.raises(KernelError, match="did you mean 'rms_norm'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, kernels={"rmsnorm": "torch"})
