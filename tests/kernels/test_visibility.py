"""Intervals of visible keys equal the described mask, written out one pair at a time."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone import AttentionMask
from loadstone.errors import AttentionError
from loadstone.kernels.visibility import Visibility, allowed, by_key, of_mask, packed


@st.composite
def described(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of an AttentionMask without a dense one."""
    query, past, beyond = draw(st.integers(1, 6)), draw(st.integers(0, 6)), draw(st.integers(0, 3))
    keys = past + query + beyond
    values: dict[str, Any] = {"query_length": query, "key_length": keys, "query_start": past}
    if draw(st.booleans()):
        values["query_start"] = torch.tensor(past)
    values["causal"] = draw(st.booleans())
    values["window"] = draw(st.sampled_from((None, 1, 2, 4, 100)))
    rows = st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=2, max_size=2)
    if draw(st.booleans()):
        values["padding"] = torch.tensor(draw(rows))
    if draw(st.booleans()):
        values["segments"] = torch.tensor(draw(rows)).cumsum(-1)
    for name in ("key_start", "key_end"):
        if draw(st.booleans()):
            values[name] = torch.tensor(draw(st.lists(st.integers(0, keys), min_size=2, max_size=2)))
    return values


def written_out(v: dict[str, Any]) -> torch.Tensor:
    """(2, query_length, key_length), by the definitions in AttentionMask."""

    def visible(row: int, query: int, key: int) -> bool:
        place = int(v["query_start"]) + query
        return (
            not (v["causal"] and key > place)
            and not (v["window"] is not None and key <= place - v["window"])
            and not ("key_start" in v and key < v["key_start"][row])
            and not ("key_end" in v and key >= v["key_end"][row])
            and not ("padding" in v and not v["padding"][row, key])
            and not ("segments" in v and bool(v["segments"][row, place] != v["segments"][row, key]))
        )

    return torch.tensor(
        [[[visible(b, q, k) for k in range(v["key_length"])] for q in range(v["query_length"])] for b in (0, 1)]
    )


def check_order(visibility: Visibility, queries: int, keys: int) -> None:
    """Ends that never move backwards, and the same intervals seen from the keys."""
    if visibility.lower is None or visibility.upper is None:
        assert by_key(visibility, keys) == (None, None)
        return
    for bound in (visibility.lower, visibility.upper):
        assert bound.dtype == torch.int32
        assert (bound.diff(dim=-1) >= 0).all()
    assert (visibility.upper <= keys).all()
    assert (visibility.lower >= 0).all()
    first, end = by_key(visibility, keys)
    assert first is not None
    assert end is not None
    place = torch.arange(queries)[None, :, None]
    from_keys = (place >= first[:, None, :]) & (place < end[:, None, :])
    ends = Visibility(lower=visibility.lower, upper=visibility.upper)
    assert torch.equal(from_keys, allowed(ends, queries, keys, torch.device("cpu")))


@tiny.examples(300)
@given(values=described())
def test_intervals_say_what_the_mask_says(values: dict[str, Any]) -> None:
    mask = AttentionMask(**values)
    visibility = of_mask(mask)
    queries, keys = values["query_length"], values["key_length"]
    seen = allowed(visibility, queries, keys, torch.device("cpu")).expand(2, -1, -1)
    assert torch.equal(seen, written_out(values))
    check_order(visibility, queries, keys)
    if visibility.keep is not None:  # no holes: the intervals alone must say it all
        assert visibility.holes is not None
        ends = Visibility(lower=visibility.lower, upper=visibility.upper)
        alone = allowed(ends, queries, keys, torch.device("cpu")).expand(2, -1, -1)
        whole = visibility.holes == 0
        assert torch.equal(alone[whole], seen[whole])


@tiny.examples(200)
@given(
    parts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    causal=st.booleans(),
    window=st.sampled_from((0, 1, 2, 9)),
    behind=st.integers(0, 2),
)
def test_packed_sequences(parts: list[tuple[int, int]], causal: bool, window: int, behind: int) -> None:
    cu_q = torch.tensor([0, *(q for q, _ in parts)]).cumsum(0)
    cu_k = torch.tensor([0, *(k for _, k in parts)]).cumsum(0)
    queries, keys = int(cu_q[-1]) + behind, int(cu_k[-1]) + behind
    visibility = packed(cu_q, cu_k, queries, keys, causal, window)
    truth = torch.zeros(queries, keys, dtype=torch.bool)
    for row, (count_q, count_k) in enumerate(parts):
        for i in range(count_q):
            for j in range(count_k):
                place = i + count_k - count_q
                hidden = (causal and j > place) or (window and j <= place - window)
                truth[cu_q[row] + i, cu_k[row] + j] = not hidden
    assert torch.equal(allowed(visibility, queries, keys, torch.device("cpu"))[0], truth)
    check_order(visibility, queries, keys)


def test_a_dense_mask_is_no_interval() -> None:
    with pytest.raises(AttentionError, match="sdpa"):
        of_mask(AttentionMask(2, 3, dense=torch.ones(1, 1, 2, 3, dtype=torch.bool)))
