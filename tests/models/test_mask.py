"""The described mask equals a brute-force definition, however it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone import AttentionMask, DynamicCache, MistralConfig, StaticCache
from loadstone.errors import ArgumentError, AttentionError
from loadstone.kernels import attention
from loadstone.models.masks import build_mask, packed_segments


@st.composite
def described(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of an AttentionMask."""
    query, past, beyond = draw(st.integers(1, 6)), draw(st.integers(0, 6)), draw(st.integers(0, 3))
    keys = past + query + beyond
    values: dict[str, Any] = {"query_length": query, "key_length": keys, "query_start": past}
    values["causal"] = draw(st.booleans())
    values["window"] = draw(st.sampled_from((None, 1, 2, 4, 100)))
    rows = st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=2, max_size=2)
    if draw(st.booleans()):
        values["padding"] = torch.tensor(draw(rows))
    if draw(st.booleans()):
        values["segments"] = torch.tensor(draw(rows)).cumsum(-1)
    for name in ("key_start", "key_end"):
        if draw(st.booleans()):
            count = draw(st.integers(1, 2))
            values[name] = torch.tensor(draw(st.lists(st.integers(0, keys), min_size=count, max_size=count)))
    return values


def visible(v: dict[str, Any], row: int, query: int, key: int) -> bool:
    """Whether a query sees a key, one pair at a time."""
    place = v["query_start"] + query
    if v["causal"] and key > place:
        return False
    if v["window"] is not None and key <= place - v["window"]:
        return False
    if v.get("padding") is not None and not v["padding"][row, key]:
        return False
    bounds = {name: v[name].expand(2)[row] for name in ("key_start", "key_end") if name in v}
    if not bounds.get("key_start", 0) <= key < bounds.get("key_end", v["key_length"]):
        return False
    return v.get("segments") is None or bool(v["segments"][row, place] == v["segments"][row, key])


def brute_force(v: dict[str, Any]) -> torch.Tensor:
    """(2, 1, query_length, key_length)."""
    table = [
        [[visible(v, row, q, k) for k in range(v["key_length"])] for q in range(v["query_length"])] for row in (0, 1)
    ]
    return torch.tensor(table)[:, None]


@tiny.examples(200)
@given(values=described(), on_device=st.booleans())
def test_equals_brute_force(values: dict[str, Any], on_device: bool) -> None:
    truth = brute_force(values)
    if on_device:
        values["query_start"] = torch.tensor(values["query_start"])
    mask = AttentionMask(**values)
    assert not on_device or not (mask.sees_everything or mask.is_causal_only)
    allowed = mask.allowed()
    if allowed is None:
        assert mask.sees_everything
        assert truth.all()
        assert mask.bias(torch.float32) is None
    else:
        assert torch.equal(allowed.expand_as(truth), truth)
        for dtype in (torch.float32, torch.bfloat16):
            bias = mask.bias(dtype)
            assert bias is not None
            assert bias.dtype == dtype
            assert torch.equal((bias == 0).expand_as(truth), truth)
            assert torch.isfinite(bias).all()
    if mask.is_causal_only:
        assert torch.equal(truth[0, 0], torch.ones_like(truth[0, 0]).tril())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@tiny.examples(40)
@given(values=described(), groups=st.sampled_from((1, 2)))
def test_attention_sees_exactly_that(implementation: str, values: dict[str, Any], groups: int) -> None:
    """Both implementations against softmax over the visible keys, computed one query at a time in float64."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2 * groups, values["query_length"], 4, generator=generator)
    key, value = (torch.randn(2, 2, values["key_length"], 4, generator=generator) for _ in range(2))
    output, _ = attention(implementation, query, key, value, AttentionMask(**values), scaling=0.7)
    assert torch.isfinite(output).all()
    truth = brute_force(values)
    for row in range(2):
        for head in range(2 * groups):
            for q in range(values["query_length"]):
                seen = truth[row, 0, q]
                if not seen.any():
                    continue  # nothing to look at: any finite value will do
                keys, held = key[row, head // groups].double(), value[row, head // groups].double()
                weights = (keys[seen] @ query[row, head, q].double() * 0.7).softmax(0)
                assert torch.allclose(output[row, head, q].double(), weights @ held[seen], atol=1e-5)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(AttentionError, match="covers 3 keys, attention sees 4"):
        AttentionMask(2, 4, padding=torch.ones(1, 3, dtype=torch.bool))
    for shape in ((2, 4), (1, 1, 2, 3), (1, 1, 3, 4)):
        with pytest.raises(AttentionError, match="dense"):
            AttentionMask(2, 4, dense=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(AttentionError, match="key_end must be"):
        AttentionMask(2, 4, key_end=torch.tensor(3))
    with pytest.raises(ArgumentError, match="attention_mask"):
        build_mask(torch.zeros(1, 2, 4), torch.ones(1, 2, 2), None, None)


@tiny.examples(60)
@given(
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    window=st.sampled_from((None, 2, 3, 7)),
    left=st.integers(0, 4),
    static=st.booleans(),
    whole=st.booleans(),
)
def test_build_mask_follows_the_cache(
    chunks: list[int], window: int | None, left: int, static: bool, whole: bool
) -> None:
    """Whatever a cache has dropped or not written yet, a query sees the same absolute positions."""
    config = MistralConfig.from_dict(tiny.values("mistral", sliding_window=window, num_hidden_layers=1))
    total = sum(chunks)
    cache = StaticCache(config, total + 3) if static else DynamicCache(config)
    padding = torch.ones(1, total + 3, dtype=torch.long)
    padding[:, : min(left, total - 1)] = 0
    seen = 0
    for size in chunks:
        hidden = torch.zeros(1, size, 4)
        given = padding if static and whole else padding[:, : seen + size]  # one entry a token, or one a place
        mask = build_mask(hidden, given, None, cache, window=window)
        # each key and value carries its absolute position, so that what is attended to can be read off
        positions = torch.arange(seen, seen + size, dtype=torch.float32).view(1, 1, size, 1).expand(1, 2, size, 8)
        keys, _ = cache.update(positions, positions, 0)
        assert keys.shape[2] == mask.key_length
        allowed = mask.allowed()
        for q in range(size):
            place = seen + q
            row = torch.ones(mask.key_length, dtype=torch.bool) if allowed is None else allowed[0, 0, q]
            got = sorted(keys[0, 0, row, 0].tolist())
            first = 0 if window is None else max(0, place - window + 1)
            assert got == [p for p in range(first, place + 1) if padding[0, p]]
        seen += size


@pytest.mark.parametrize("window", [None, 3])
def test_a_padding_mask_that_fits_no_static_cache(window: int | None) -> None:
    config = MistralConfig.from_dict(tiny.values("mistral", sliding_window=window, num_hidden_layers=1))
    cache = StaticCache(config, 20)
    cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    for count, entries in ((1, 5), (1, 7), (2, 2), (1, 21)):
        with pytest.raises(AttentionError, match=f"covers {entries} keys, the static cache takes {5 + count} or 20"):
            build_mask(torch.zeros(1, count, 4), torch.ones(1, entries), None, cache, window=window)


@tiny.examples(20)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4), window=st.sampled_from((None, 3)))
def test_packed_sequences_fill_a_static_cache(lengths: list[int], window: int | None) -> None:
    """The mask is that of a forward without a cache."""
    config = MistralConfig.from_dict(tiny.values("mistral", sliding_window=window, num_hidden_layers=1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    hidden = torch.zeros(1, positions.shape[1], 4)
    mask = build_mask(hidden, None, positions, StaticCache(config, 20), window=window)
    alone = build_mask(hidden, None, positions, None, window=window)
    assert (mask.allowed() is None) == (alone.allowed() is None)
    if (expected := alone.allowed()) is not None:
        assert torch.equal(mask.allowed(), expected)
    if mask.segments is not None:
        assert (mask.segments.diff(dim=-1) >= 0).all()


def test_packed_segments() -> None:
    assert packed_segments(torch.arange(5)[None], 2) is None
    assert packed_segments(torch.arange(5)[None] + 7, 1) is None
    found = packed_segments(torch.tensor([[0, 1, 2, 0, 1, 0]]), 2)
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 1, 1, 2]] * 2
