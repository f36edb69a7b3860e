"""Forward passes equal to transformers' on configurations drawn over every option: logits, inputs, caches, outputs."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from parity import peers
from parity.peers import Case, relative, transformers

from loadstone import DynamicCache
from loadstone.errors import ArgumentError, AttentionError

TOLERANCE = 1e-5
both = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
kinds = pytest.mark.parametrize("kind", tiny.KINDS)


def padding(draw: Any, batch: int, length: int) -> torch.Tensor:
    """(batch, length) of 0 and 1 with padding on the left, the right or both, never a whole row."""
    keep = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        left = draw(st.integers(0, length - 1))
        right = draw(st.integers(0, length - 1 - left))
        if draw(st.booleans()):
            left, right = (0, right) if draw(st.booleans()) else (left, 0)
        keep[row, :left] = 0
        keep[row, length - right :] = 0
    return keep


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count kept tokens only, as generation passes them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@both
@kinds
@tiny.examples(20)
@given(data=st.data())
def test_logits(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    ids = peers.tokens(case.seed, data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 2, 9, 17, 40))))
    with torch.no_grad():
        assert relative(mine(ids).logits, peer(ids).logits) <= TOLERANCE


@both
@pytest.mark.parametrize("rope_type", peers.ROPE_TYPES)
@tiny.examples(5)
@given(data=st.data())
def test_rope_types(rope_type: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases("llama", rope_type))
    mine, _ = case.pair(implementation)
    longest = case.values["max_position_embeddings"]
    for length in (5, longest + 3, 7):  # beyond the trained length and back: no state is carried over
        ids = peers.tokens(case.seed, 1, length)
        with torch.no_grad():
            theirs = case.pair(implementation)[1](ids).logits  # a fresh peer: its rotary embedding keeps state
            assert relative(mine(ids).logits, theirs) <= TOLERANCE


@both
@kinds
@tiny.examples(12)
@given(data=st.data())
def test_padding_on_either_side(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    ids = peers.tokens(case.seed, 3, data.draw(st.integers(2, 20)))
    mask = padding(data.draw, *ids.shape)
    kept = mask.bool()
    extra = {"position_ids": positions_of(mask)} if data.draw(st.booleans()) else {}
    given_mask = mask if data.draw(st.booleans()) else kept
    with torch.no_grad():
        ours = mine(ids, attention_mask=given_mask, **extra).logits
        theirs = peer(ids, attention_mask=mask, **extra).logits
    assert torch.isfinite(ours).all()
    assert relative(ours[kept], theirs[kept]) <= TOLERANCE


@both
@kinds
@tiny.examples(8)
@given(data=st.data())
def test_position_ids(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    length = data.draw(st.integers(1, 12))
    start = data.draw(st.lists(st.integers(0, 50), min_size=2, max_size=2))
    ids = peers.tokens(case.seed, 2, length)
    positions = torch.tensor(start)[:, None] + torch.arange(length)
    with torch.no_grad():
        ours = mine(ids, position_ids=positions).logits
        assert relative(ours, peer(ids, position_ids=positions).logits) <= TOLERANCE


@both
@kinds
@tiny.examples(10)
@given(data=st.data())
def test_packed_sequences(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    parts = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    positions = torch.cat([torch.arange(n) for n in parts])[None]
    ids = peers.tokens(case.seed, 1, sum(parts))
    with torch.no_grad():
        theirs = peer(ids, position_ids=positions, use_cache=False).logits
        for use_cache in (False, True):
            assert relative(mine(ids, position_ids=positions, use_cache=use_cache).logits, theirs) <= TOLERANCE
        if case.values.get("rope_parameters", case.values.get("rope_scaling")) is None:
            apart = torch.cat([mine(part).logits for part in ids.split(parts, dim=1)], dim=1)
            assert relative(apart, theirs) <= TOLERANCE


@both
@kinds
@tiny.examples(8)
@given(data=st.data())
def test_inputs_embeds(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    embeds = mine.get_input_embeddings()(peers.tokens(case.seed, 2, 9)).detach() + 0.1
    with torch.no_grad():
        assert relative(mine(inputs_embeds=embeds).logits, peer(inputs_embeds=embeds).logits) <= TOLERANCE
        ids = peers.tokens(case.seed, 2, 9)
        plain = mine(inputs_embeds=mine.get_input_embeddings()(ids)).logits
        assert torch.equal(plain, mine(ids).logits)


@pytest.mark.parametrize("keep", [0, 1, 3, "positions", "rows", "mask"])
@kinds
def test_logits_to_keep(kind: str, keep: int | str) -> None:
    case = Case(kind, tiny.values(kind), 3)
    mine, peer = case.pair()
    ids = peers.tokens(1, 2, 9)
    wanted: Any = {
        "positions": torch.tensor([0, 4, 8]),
        "rows": torch.tensor([[0, 2], [7, 8]]),
        "mask": torch.arange(18).view(2, 9) % 3 == 0,
    }.get(str(keep), keep)
    with torch.no_grad():
        ours, theirs = mine(ids, logits_to_keep=wanted).logits, peer(ids, logits_to_keep=wanted).logits
        every = mine(ids).logits
    assert relative(ours, theirs) <= TOLERANCE
    if isinstance(wanted, int) and wanted:
        assert relative(ours, every[:, -wanted:]) <= TOLERANCE


@both
@kinds
@tiny.examples(14)
@given(data=st.data())
def test_cache_in_chunks(kind: str, implementation: str, data: st.DataObject) -> None:
    """Prefill in chunks, then decode token by token, each step against the peer with its own cache."""
    case = data.draw(peers.cases(kind))
    assume(case.values.get("sliding_window") != 1)  # the peer's cache fails there; test_sliding_window has it
    mine, peer = case.pair(implementation)
    chunks = [*data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)), 1, 1, 1]
    ids = peers.tokens(case.seed, 2, sum(chunks))
    padded = data.draw(st.booleans())
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : data.draw(st.integers(1, chunks[0]))] = 0
        mask[0, chunks[0] - 1] = 1
    positions = positions_of(mask)
    cache, peer_cache = DynamicCache(mine.config), transformers.DynamicCache(config=peer.config)
    seen = 0
    for size in chunks:
        now = slice(seen, seen + size)
        seen += size
        extra = {"attention_mask": mask[:, :seen], "position_ids": positions[:, now]} if padded else {}
        with torch.no_grad():
            ours = mine(ids[:, now], past_key_values=cache, use_cache=True, **extra)
            theirs = peer(ids[:, now], past_key_values=peer_cache, use_cache=True, **extra)
        assert ours.past_key_values is cache
        assert cache.get_seq_length() == peer_cache.get_seq_length() == seen
        kept = mask[:, now].bool()
        assert relative(ours.logits[kept], theirs.logits[kept]) <= TOLERANCE


@both
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 18, 100])
def test_sliding_window(implementation: str, window: int) -> None:
    case = Case("mistral", tiny.values("mistral", sliding_window=window, num_hidden_layers=3), window)
    mine, peer = case.pair(implementation)
    ids = peers.tokens(0, 2, 17)
    with torch.no_grad():
        ours = mine(ids, use_cache=True)
        assert relative(ours.logits, peer(ids).logits) <= TOLERANCE
        more = peers.tokens(1, 2, 4)
        stepped = mine(more, past_key_values=ours.past_key_values).logits
        assert relative(stepped, peer(torch.cat((ids, more), 1)).logits[:, -4:]) <= TOLERANCE


@both
@kinds
@tiny.examples(6)
@given(data=st.data())
def test_hidden_states(kind: str, implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    ids = peers.tokens(case.seed, 2, 7)
    with torch.no_grad():
        ours, theirs = mine(ids, output_hidden_states=True), peer(ids, output_hidden_states=True)
    assert set(ours.keys()) == {{"cache": "past_key_values"}.get(name, name) for name in theirs}  # renamed in 5.24
    assert len(ours.hidden_states) == len(theirs.hidden_states) == mine.config.num_hidden_layers + 1
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert relative(a, b) <= TOLERANCE
    assert torch.equal(mine.lm_head(ours.hidden_states[-1]), ours.logits)


@kinds
@tiny.examples(8)
@given(data=st.data())
def test_attention_weights(kind: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair("eager")
    ids = peers.tokens(case.seed, 2, 9)
    mask = padding(data.draw, 2, 9)
    kept = mask.bool()
    with torch.no_grad():
        ours = mine(ids, attention_mask=mask, output_attentions=True)
        theirs = peer(ids, attention_mask=mask, output_attentions=True)
    assert len(ours.attentions) == mine.config.num_hidden_layers
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        assert a.shape == (2, mine.config.num_attention_heads, 9, 9)
        assert relative(a.transpose(1, 2)[kept], b.transpose(1, 2)[kept]) <= TOLERANCE
    mine.set_attn_implementation("sdpa")
    with pytest.raises(AttentionError, match="eager"):
        mine(ids, output_attentions=True)


@kinds
def test_tuple_output(kind: str) -> None:
    mine, peer = Case(kind, tiny.values(kind), 4).pair()
    ids = peers.tokens(2, 2, 6)
    with torch.no_grad():
        for extra in ({}, {"labels": ids}, {"labels": ids, "output_hidden_states": True, "output_attentions": True}):
            ours = mine(ids, return_dict=False, use_cache=False, **extra)
            theirs = peer(ids, return_dict=False, use_cache=False, **extra)
            theirs = tuple(part for part in theirs if part != ())  # GPT-2's cross-attentions, which are never there
            assert isinstance(ours, tuple)
            assert len(ours) == len(theirs)
            flat = zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True)
            assert all(relative(a, b) <= TOLERANCE for a, b in flat)
            named = mine(ids, use_cache=False, **extra)
            assert [type(a) for a in named.to_tuple()] == [type(a) for a in ours]


@both
@tiny.examples(6)
@given(data=st.data())
def test_token_type_ids(implementation: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases("gpt2"))
    mine, peer = case.pair(implementation)
    ids, types = peers.tokens(case.seed, 2, 8), peers.tokens(case.seed + 1, 2, 8)
    with torch.no_grad():
        theirs = peer(ids, token_type_ids=types).logits
        assert relative(mine(ids, token_type_ids=types).logits, theirs) <= TOLERANCE
        embeds = mine.get_input_embeddings()(ids)
        assert relative(mine(inputs_embeds=embeds, token_type_ids=types).logits, theirs) <= TOLERANCE


@both
@pytest.mark.parametrize("form", ["bool", "additive"])
@kinds
@tiny.examples(5)
@given(data=st.data())
def test_dense_masks(kind: str, form: str, implementation: str, data: st.DataObject) -> None:
    """A 4-D mask is taken as it is: here a random one, in which every token sees itself."""
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair(implementation)
    length = data.draw(st.integers(2, 10))
    ids = peers.tokens(case.seed, 2, length)
    generator = torch.Generator().manual_seed(case.seed)
    heads = data.draw(st.sampled_from((1, mine.config.num_attention_heads)))
    visible = torch.rand(2, heads, length, length, generator=generator) < 0.5
    visible |= torch.eye(length, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    theirs_mask = visible if implementation == "sdpa" else additive  # the peer's eager adds whatever it is given
    with torch.no_grad():
        ours = mine(ids, attention_mask=visible if form == "bool" else additive).logits
        assert relative(ours, peer(ids, attention_mask=theirs_mask).logits) <= TOLERANCE


@kinds
def test_dense_bias_is_added(kind: str) -> None:
    """An additive mask may hold any finite bias, not only visible and hidden."""
    for implementation in ("eager", "sdpa"):
        mine, peer = Case(kind, tiny.values(kind), 8).pair(implementation)
        ids = peers.tokens(3, 2, 6)
        bias = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = mine(ids, attention_mask=bias).logits
            assert relative(ours, peer(ids, attention_mask=bias).logits) <= TOLERANCE
            cached = mine(ids[:, :5], attention_mask=bias[:, :, :5, :5], use_cache=True)
            last = mine(ids[:, 5:], attention_mask=bias[:, :, 5:, :], past_key_values=cached.past_key_values).logits
            hidden = bias.clone()
            hidden[:, :, :5, 5] = torch.finfo(torch.float32).min
            assert relative(last, peer(ids, attention_mask=hidden).logits[:, 5:]) <= TOLERANCE


@kinds
@tiny.examples(6)
@given(data=st.data())
def test_switching_attention_at_run_time(kind: str, data: st.DataObject) -> None:
    case = data.draw(peers.cases(kind))
    mine, peer = case.pair("eager")
    ids = peers.tokens(case.seed, 2, 9)
    with torch.no_grad():
        eager = mine(ids).logits
        for name in ("sdpa", "eager"):
            mine.set_attn_implementation(name)
            peer.set_attn_implementation(name)
            now = mine(ids).logits
            assert relative(now, peer(ids).logits) <= TOLERANCE
    assert torch.equal(now, eager)
    with pytest.raises(AttentionError, match="sdpa"):
        mine.set_attn_implementation("spda")
    assert mine.config._attn_implementation == "eager"


@kinds
def test_input_errors(kind: str) -> None:
    mine = tiny.model(kind)
    ids = peers.tokens(0, 1, 4)
    with pytest.raises(ArgumentError, match="exactly one"):
        mine()
    with pytest.raises(ArgumentError, match="exactly one"):
        mine(ids, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ArgumentError, match="attention_mask"):
        mine(ids, attention_mask=torch.ones(4))
    with pytest.raises(AttentionError, match="keys"):
        mine(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(TypeError, match="labels"):
        mine(ids, lables=ids)
    with pytest.raises(ValueError, match="logits_to_keep"):
        mine(ids, labels=ids, logits_to_keep=2)
