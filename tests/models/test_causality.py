"""What a position may depend on: nothing that comes later, nothing beyond the window, nothing that is padding."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from loadstone import DynamicCache

both = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
kinds = pytest.mark.parametrize("kind", tiny.KINDS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@both
@kinds
@tiny.examples(12)
@given(length=st.integers(2, 24), cut=st.integers(1, 23), seed=st.integers(0, 1000))
def test_the_future_changes_nothing_in_the_past(
    kind: str, implementation: str, length: int, cut: int, seed: int
) -> None:
    cut = min(cut, length - 1)
    model = tiny.model(kind, seed, implementation)
    ids = tokens(seed, 2, length)
    changed = torch.cat((ids[:, :cut], (ids[:, cut:] + 1) % 61), 1)
    with torch.no_grad():
        before, after, alone = model(ids).logits, model(changed).logits, model(ids[:, :cut]).logits
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert torch.allclose(before[:, :cut], alone, **CLOSE)
    assert not torch.allclose(before[:, cut:], after[:, cut:], **CLOSE)


@both
@tiny.examples(10)
@given(window=st.integers(1, 6), layers=st.integers(1, 3), seed=st.integers(0, 1000))
def test_a_window_reaches_so_far_and_no_further(implementation: str, window: int, layers: int, seed: int) -> None:
    """Through each layer information moves by window - 1 places: exactly that many tokens back matter."""
    model = tiny.model("mistral", seed, implementation, sliding_window=window, num_hidden_layers=layers)
    reach = layers * (window - 1)
    length = reach + 6
    ids = tokens(seed, 1, length)
    beyond, edge = ids.clone(), ids.clone()
    beyond[0, : length - 1 - reach] = (beyond[0, : length - 1 - reach] + 1) % 61
    edge[0, length - 1 - reach] = (edge[0, length - 1 - reach] + 1) % 61
    with torch.no_grad():
        last, same, other = (model(x).logits[0, -1] for x in (ids, beyond, edge))
    assert torch.allclose(last, same, **CLOSE)
    assert not torch.equal(last, other)


@both
@kinds
@tiny.examples(12)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_padding_changes_nothing(kind: str, implementation: str, data: st.DataObject, seed: int) -> None:
    """A row in a padded batch gives what it gives alone, whatever stands in the padding, with a cache or without."""
    model = tiny.model(kind, seed, implementation)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=3))
    side = data.draw(st.sampled_from(("left", "right")))
    width = max(lengths) + data.draw(st.integers(0, 2))
    ids, mask = tokens(seed, len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1 if side == "left" else 0
        mask[row, :length] = 1 if side == "right" else mask[row, :length]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for use_cache in (False, True):
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
            assert torch.isfinite(logits).all()
            for row in range(len(lengths)):
                kept = mask[row].bool()
                alone = model(ids[row, kept][None]).logits[0]
                assert torch.allclose(logits[row, kept], alone, **CLOSE)


@both
@kinds
@tiny.examples(10)
@given(chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_a_cache_changes_nothing(kind: str, implementation: str, chunks: list[int], seed: int) -> None:
    model = tiny.model(kind, seed, implementation)
    ids = tokens(seed, 2, sum(chunks))
    cache = DynamicCache(model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(chunks, 1)]
    assert whole.past_key_values is None
    assert torch.allclose(torch.cat(parts, 1), whole.logits, **CLOSE)


@both
@kinds
def test_rows_do_not_see_each_other(kind: str, implementation: str) -> None:
    model = tiny.model(kind, 1, implementation)
    ids = tokens(3, 3, 9)
    with torch.no_grad():
        together = model(ids).logits
        for row in range(3):
            assert torch.allclose(together[row], model(ids[row : row + 1]).logits[0], **CLOSE)


@kinds
def test_both_implementations_agree(kind: str) -> None:
    model = tiny.model(kind, 2)
    ids = tokens(4, 2, 20)
    with torch.no_grad():
        eager = model(ids).logits
        model.set_attn_implementation("sdpa")
        assert torch.allclose(eager, model(ids).logits, **CLOSE)
