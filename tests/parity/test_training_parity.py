"""Losses and gradients equal to transformers', in fp32 and, within rounding, in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import peers
from parity.peers import Case, gradient_gap, gradients, relative

TOLERANCE = 1e-5
both = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
kinds = pytest.mark.parametrize("kind", tiny.KINDS)


@st.composite
def batches(draw: st.DrawFn, seed: int) -> dict[str, Any]:
    """Inputs of a training step: padding, ignored labels, one of the ways to give and to weigh labels."""
    length = draw(st.integers(2, 14))
    ids = peers.tokens(seed, 2, length)
    inputs: dict[str, Any] = {"input_ids": ids}
    labels = ids.clone()
    if draw(st.booleans()):
        labels[0, : draw(st.integers(0, length - 1))] = -100
    if draw(st.booleans()):
        inputs["attention_mask"] = torch.ones_like(ids)
        cut = draw(st.integers(1, length))
        inputs["attention_mask"][1, cut:] = 0
        labels[1, cut:] = -100
    if draw(st.booleans()):
        inputs["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()  # for the peer
    inputs["labels"] = labels
    count = draw(st.sampled_from((None, 7, "tensor")))
    if count is not None:
        inputs["num_items_in_batch"] = torch.tensor(11) if count == "tensor" else count
    return inputs


@both
@kinds
@tiny.examples(14)
@given(data=st.data())
def test_loss_and_all_gradients(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    mine.train()
    peer.train()
    inputs = data.draw(batches(case.seed))
    fused = data.draw(st.booleans())
    ours, theirs = mine(**inputs, **({} if fused else {"skip_logits": False})), peer(**inputs)
    assert (ours.logits is None) == fused
    assert ours.loss.dtype == torch.float32
    assert abs(ours.loss.item() - theirs.loss.item()) <= TOLERANCE * max(theirs.loss.item(), 1.0)
    ours, theirs = gradients(mine, ours.loss), gradients(peer, theirs.loss)
    assert set(ours) == {name for name, _ in mine.named_parameters()}
    gap = gradient_gap(ours, theirs)
    if gap > TOLERANCE:  # ill-conditioned draws (a norm over three values): the peer's own two backends say how much
        other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
        peer.set_attn_implementation(other)
        noise = gradient_gap(gradients(peer, peer(**inputs).loss), theirs)
        assert gap <= 2 * noise <= 1e-4


@kinds
def test_nothing_to_learn_from(kind: str) -> None:
    """All labels ignored: the mean over nothing is what the peer says it is; a given count makes it zero."""
    mine, peer = Case(kind, tiny.values(kind), 1).pair()
    ids = peers.tokens(0, 1, 5)
    labels = torch.full_like(ids, -100)
    for fused in (False, True):
        loss = mine(ids, labels=labels, skip_logits=fused).loss
        assert torch.isnan(loss).equal(torch.isnan(peer(ids, labels=labels).loss))
        assert mine(ids, labels=labels, num_items_in_batch=3, skip_logits=fused).loss.item() == 0


@kinds
@pytest.mark.parametrize("fused", [False, True])
def test_ignore_index(kind: str, fused: bool) -> None:
    mine, peer = Case(kind, tiny.values(kind), 1).pair()
    ids = peers.tokens(0, 2, 9)
    ours = mine(ids, labels=ids, ignore_index=int(ids[0, 4]), skip_logits=fused)
    theirs = peer(ids, labels=ids, ignore_index=int(ids[0, 4]))
    assert abs(ours.loss.item() - theirs.loss.item()) <= 1e-5


@both
@kinds
@tiny.examples(5)
@given(data=st.data())
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, _ = case.pair(implementation)
    mine.train()
    inputs = data.draw(batches(case.seed))
    plain = gradients(mine, mine(**inputs).loss)
    for reentrant in (False, True):
        mine.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            mine.enable_input_require_grads()
        assert mine.is_gradient_checkpointing
        again = gradients(mine, mine(**inputs).loss)
        assert gradient_gap(again, plain) <= 1e-6
    mine.disable_input_require_grads()
    mine.gradient_checkpointing_disable()
    assert not mine.is_gradient_checkpointing
    assert gradient_gap(gradients(mine, mine(**inputs).loss), plain) == 0


@kinds
def test_a_training_step_moves_both_models_alike(kind: str) -> None:
    mine, peer = Case(
        kind,
        tiny.values(kind, **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {})),
        5,
    ).pair("sdpa")
    ids = peers.tokens(9, 4, 16)
    losses = []
    for model in (mine, peer):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            steps.append(float(loss))
        losses.append(steps)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_is_random_in_training_only(implementation: str) -> None:
    rates = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    model = tiny.model("gpt2", attn_implementation=implementation, **rates)
    ids = peers.tokens(0, 1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        torch.manual_seed(0)
        first = model(ids).logits
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, first)


# Half precision


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(kind: str, dtype: torch.dtype) -> None:
    """Of the loss fused with the head: as near to the truth as the peer's, within the field's rule."""
    case = Case(kind, tiny.values(kind), 4)
    mine, peer = case.pair("sdpa", dtype)
    truth, _ = case.pair("sdpa")
    truth.load_state_dict(peer.state_dict())
    ids = peers.tokens(2, 4, 16)
    results = []
    for model, options in ((truth, {"skip_logits": False}), (mine, {"skip_logits": True}), (peer, {})):
        loss = model(ids, labels=ids, **options).loss
        results.append({"loss": loss.detach(), **gradients(model, loss)})
    exact, ours, theirs = results
    assert set(ours) == set(exact)
    grain = torch.finfo(dtype).eps
    for name, want in exact.items():
        error, allowed = (relative(result[name].float(), want.float()) for result in (ours, theirs))
        assert error <= (2 if name == "loss" else 3) * allowed + grain, name


@both
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@tiny.examples(6)
@given(data=st.data())
def test_half_precision(kind: str, dtype: torch.dtype, implementation: str, data: st.DataObject) -> None:
    """As near to the truth (fp32 with the same rounded weights) as the peer, and near the peer."""
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation, dtype)
    truth, _ = case.pair(implementation)
    truth.load_state_dict(peer.state_dict())
    ids = peers.tokens(case.seed, 2, 12)
    with torch.no_grad():
        exact, ours, theirs = truth(ids).logits, mine(ids).logits, peer(ids).logits
    assert ours.dtype == dtype
    grain = torch.finfo(dtype).eps
    error = relative(ours.float(), exact)
    assert error <= 2 * relative(theirs.float(), exact) + 2 * grain
    assert relative(ours, theirs) <= 16 * grain


@pytest.mark.parametrize("rope_type", peers.ROPE_TYPES)
@tiny.examples(2)
@given(data=st.data())
def test_rope_buffers_stay_fp32(rope_type: str, data: st.DataObject) -> None:
    """Casting a model casts what was trained, never the frequencies."""
    case = data.draw(peers.cases("llama", rope_type))
    mine, peer = case.pair("eager", torch.bfloat16)
    before = mine.model.rotary_emb.inv_freq.clone()
    for cast in ("bfloat16", "half", "to", "double", "float"):
        getattr(mine, cast)(*([torch.bfloat16] if cast == "to" else []))
        after = mine.model.rotary_emb.inv_freq
        assert after.dtype == torch.float32
        assert torch.equal(after, before)
        assert torch.equal(after, peer.model.rotary_emb.inv_freq)
    assert not [name for name in mine.state_dict() if "inv_freq" in name]
    assert mine.dtype == torch.float32


def test_upcast_scores_survive_half_precision() -> None:
    """reorder_and_upcast_attn is for this: scores that fp16 cannot hold.

    First layer only: later ones get other inputs by rounding. Scaled scores stay below 65504, for the peer hides the
    future by subtracting no more than that.
    """
    case = Case("gpt2", tiny.values("gpt2", reorder_and_upcast_attn=True), 3)
    mine, peer = case.pair("eager", torch.float16)
    plain = Case("gpt2", tiny.values("gpt2"), 3).pair("eager", torch.float16)[0]
    ids = peers.tokens(0, 2, 12)
    with torch.no_grad():
        for model in (mine, peer, plain):
            model.transformer.h[0].attn.c_attn.weight[:, :64] *= 120
        ours = mine(ids, output_attentions=True).attentions[0]
        block = mine.transformer.h[0]
        states = block.ln_1(mine.transformer.wte(ids) + mine.transformer.wpe(torch.arange(12)))
        query, key = block.attn.c_attn(states)[..., :64].view(2, 12, 2, 4, 8).permute(2, 0, 3, 1, 4).double()
        scores = query @ key.transpose(2, 3)
        assert float(scores.abs().max()) > torch.finfo(torch.float16).max
        future = torch.ones(12, 12, dtype=torch.bool).triu(1)
        exact = (scores / 8**0.5).masked_fill(future, -torch.inf).softmax(-1)
        assert relative(ours.double(), exact) <= 1e-3
        assert relative(ours, peer(ids, output_attentions=True).attentions[0]) <= 1e-3
        assert not torch.isfinite(plain(ids).logits).all()
