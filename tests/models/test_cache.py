"""Any sequence of cache operations equals the same sequence on tensors joined with torch.cat."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cache_reference import HEADS, MODES, OPERATION, WIDTH, Reference, Shape, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import GenerationError
from loadstone.models.cache import Cache, DynamicCache, StaticCache
from loadstone.models.cache_layers import DynamicLayer


def check_held(layer: Any, reference: Reference) -> None:
    held = reference.length if reference.window is None else min(reference.length, reference.window - 1)
    if reference.key is not None and layer.keys is not None:
        assert torch.equal(layer.keys, reference.key[:, :, reference.length - held :])
        assert torch.equal(layer.values, reference.value[:, :, reference.length - held :])


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.none(), st.integers(1, 9)), st.lists(OPERATION, min_size=1, max_size=30), st.sampled_from([None, 20])
)
def test_any_sequence_equals_concatenation(
    window: int | None, operations: list[tuple[str, Any]], expected: int | None
) -> None:
    cache: Cache = DynamicCache(Shape(sliding_window=window), expected_length=expected)
    references = [Reference(window), Reference(window)]
    generator = torch.Generator().manual_seed(0)
    batch, mode = 2, "no_grad"
    for name, argument in operations:
        length = references[0].length
        with MODES[mode]():
            if name == "mode":
                mode = argument
            elif name == "copy":
                cache = copy.deepcopy(cache) if argument == "deepcopy" else pickle.loads(pickle.dumps(cache))
            elif name == "update":
                view = cache.key_view(argument)
                for index, reference in enumerate(references):
                    key, value = tokens(batch, argument, generator)
                    seen_key, seen_value = cache.update(key, value, index)
                    expected_key, expected_value, first = reference.update(key, value)
                    assert torch.equal(seen_key, expected_key)
                    assert torch.equal(seen_value, expected_value)
                    assert (view.length, view.first, view.past) == (expected_key.shape[2], first, length)
                    assert view.query_start == length - first
            elif name == "crop" and length:
                count = min(argument, length)
                try:
                    cache.crop(-count)
                except GenerationError:
                    assert window is not None
                    assert length >= window
                else:
                    for reference in references:
                        reference.crop(count)
            elif name in ("select", "repeat") and length:
                if name == "repeat":
                    rows = torch.arange(batch).repeat_interleave(argument)
                    cache.batch_repeat_interleave(argument)
                else:
                    rows = torch.tensor(argument) % batch
                    cache.reorder_cache(rows)
                for reference in references:
                    reference.select(rows)
                batch = min(len(rows), 6)
                if batch < len(rows):
                    cache.batch_select_indices(torch.arange(len(rows)) < batch)
                    for reference in references:
                        reference.select(torch.arange(batch))
        assert cache.get_seq_length() == cache.get_seq_length(1) == references[0].length
        for layer, reference in zip(cache.layers, references, strict=True):
            check_held(layer, reference)


@pytest.mark.parametrize("window", [None, 16, 1000])
def test_appending_does_not_copy_what_is_held(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements copied over many one-token steps stay within a constant factor of the elements appended."""
    copied = 0
    original = Tensor.copy_

    def counting(self: Tensor, source: Tensor, *args: Any) -> Tensor:
        nonlocal copied
        copied += source.numel()
        return original(self, source, *args)

    def no_cat(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("appending a token joined tensors")

    monkeypatch.setattr(Tensor, "copy_", counting)
    monkeypatch.setattr(torch, "cat", no_cat)
    cache = DynamicCache(Shape(num_hidden_layers=1, sliding_window=window))
    steps, prompt = 3000, 200
    one = torch.zeros(1, HEADS, 1, WIDTH)
    with torch.no_grad():
        cache.update(torch.zeros(1, HEADS, prompt, WIDTH), torch.zeros(1, HEADS, prompt, WIDTH), 0)
        begin = copied
        for _ in range(steps):
            cache.update(one, one, 0)
    appended = 2 * steps * HEADS * WIDTH
    assert copied - begin < 8 * appended
    limit = 2 * window if window is not None else int(1.3 * (steps + prompt)) + 256
    assert cache.layers[0]._keys.shape[2] <= max(limit, prompt)


def test_first_update_copies_nothing() -> None:
    cache = DynamicCache(Shape())
    key, value = tokens(2, 7, torch.Generator().manual_seed(0))
    with torch.no_grad():
        keys, values = cache.update(key, value, 0)
    assert keys is key
    assert values is value
    assert cache.layers[0].keys.data_ptr() == key.data_ptr()


def test_a_long_prompt_does_not_stay_behind_a_window() -> None:
    cache = DynamicCache(Shape(sliding_window=4))
    key, value = tokens(1, 100, torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache.update(key, value, 0)
    assert cache.layers[0].keys.untyped_storage().nbytes() < key.untyped_storage().nbytes() / 5
    assert torch.equal(cache.layers[0].keys, key[:, :, -3:])


def test_expected_length_is_not_overshot() -> None:
    cache = DynamicCache(Shape(), expected_length=12)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        cache.update(*tokens(1, 4, generator), 0)
        cache.update(*tokens(1, 1, generator), 0)
    assert cache.layers[0]._keys.shape[2] == 12


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_flow_through_steps(window: int | None) -> None:
    """Queries, keys and values of every step get the gradients of one joined computation."""
    generator = torch.Generator().manual_seed(0)
    parts = [tokens(1, count, generator) for count in (3, 1, 2, 1, 1)]
    leaves = [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in parts]
    others = [(key.clone().requires_grad_(), value.clone().requires_grad_()) for key, value in parts]
    cache, reference = DynamicCache(Shape(num_hidden_layers=1, sliding_window=window)), Reference(window)
    total = expected = torch.zeros(())
    for (key, value), (other_key, other_value) in zip(leaves, others, strict=True):
        keys, values = cache.update(key, value, 0)
        total = total + (keys.square().sum() * values.sin().sum())
        keys, values, _ = reference.update(other_key, other_value)
        expected = expected + (keys.square().sum() * values.sin().sum())
    total.backward()
    expected.backward()
    for pair, other in zip(leaves, others, strict=True):
        for leaf, twin in zip(pair, other, strict=True):
            torch.testing.assert_close(leaf.grad, twin.grad)


def test_gradients_of_queries_over_frozen_keys() -> None:
    """Only the query is trained: what attention saved must not be written over by the next step."""
    cache = DynamicCache(Shape(num_hidden_layers=1))
    query = torch.ones(1, HEADS, 1, WIDTH, requires_grad=True)
    with torch.no_grad():
        key = torch.ones(1, HEADS, 1, WIDTH)
        cache.update(key, key, 0)
        cache.update(key, key, 0)
    total = torch.zeros(())
    for _ in range(3):
        keys, _ = cache.update(key, key, 0)
        total = total + (query @ keys.transpose(2, 3)).sum()
    total.backward()
    assert torch.equal(query.grad, torch.full_like(query, 3.0 + 4.0 + 5.0))


def test_crop_positive_is_a_length_and_refused_crop_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache(Shape())
    with torch.no_grad():
        for index in range(2):
            cache.update(*tokens(1, 9, generator), index)
    cache.crop(20)
    assert cache.get_seq_length() == 9
    cache.crop(4)
    assert cache.get_seq_length() == cache.get_seq_length(1) == 4
    cache.crop(-100)
    assert cache.get_seq_length() == 0

    mixed = DynamicCache(Shape(sliding_window=4, layer_types=["full_attention", "sliding_attention"]))
    assert mixed.is_sliding == [False, True]
    with torch.no_grad():
        for index in range(2):
            mixed.update(*tokens(1, 50, generator), index)
    with pytest.raises(GenerationError, match="layer 1 has a sliding window"):
        mixed.crop(-5)
    assert mixed.get_seq_length(0) == mixed.get_seq_length(1) == 50


def test_reordering_shares_one_spare_layer() -> None:
    """Beam search over many layers allocates one layer more, whatever the number of steps."""
    cache = DynamicCache(Shape(num_hidden_layers=4), expected_length=64)
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([1, 0])
    with torch.no_grad():
        for index in range(4):
            cache.update(*tokens(2, 8, generator), index)
        cache.reorder_cache(rows)
        seen = {layer._keys.data_ptr() for layer in cache.layers}
        first = cache.layers[0]._keys
        cache.reorder_cache(rows)
        now = {layer._keys.data_ptr() for layer in cache.layers}
    assert first.data_ptr() not in {cache.layers[0]._keys.data_ptr()}
    assert len(now - seen) <= 1


def test_bad_arguments() -> None:
    with pytest.raises(GenerationError):
        DynamicLayer(window=0)
    with pytest.raises(GenerationError):
        StaticCache(Shape(), 0)
    with pytest.raises(GenerationError, match="2 layers"):
        StaticCache(Shape(), 4).update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3), 2)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic sliding", "static", "static sliding"])
def test_updates_can_be_traced_whole(kind: str) -> None:
    """A compiler sees plain tensors and numbers, without breaks (it does specialise on the number of tokens)."""
    shape = Shape(num_hidden_layers=1, sliding_window=4 if "sliding" in kind else None)
    caches = [StaticCache(shape, 32) if "static" in kind else DynamicCache(shape) for _ in range(2)]

    def step(key: Tensor, value: Tensor) -> Tensor:
        keys, values = caches[0].update(key, value, 0)
        return keys.sum((0, 1, 3)) * values.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for count in (5, 1, 3, 1, 1):
            key, value = tokens(1, count, generator)
            keys, values = caches[1].update(key, value, 0)
            assert torch.equal(compiled(key, value), keys.sum((0, 1, 3)) * values.sum())
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 11
