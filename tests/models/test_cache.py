"""Any sequence of cache operations equals the same sequence on tensors joined with torch.cat."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import GenerationError
from loadstone.models import static_layers
from loadstone.models.cache import Cache, DynamicCache, StaticCache
from loadstone.models.cache_layers import DynamicLayer
from loadstone.models.masks import build_mask

HEADS, WIDTH, VALUE_WIDTH = 2, 3, 5


@dataclass
class Shape:
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = HEADS
    head_dim: int = WIDTH
    sliding_window: int | None = None
    layer_types: list[str] | None = None


def tokens(batch: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    key = torch.randn(batch, HEADS, count, WIDTH, generator=generator)
    # as a projection gives it: heads and positions transposed
    value = torch.randn(batch, count, HEADS, VALUE_WIDTH, generator=generator).transpose(1, 2)
    return key, value


class Reference:
    """Holds everything ever appended; knows what a window shows."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        before = self.length
        self.key = key if self.key is None else torch.cat((self.key, key), 2)
        self.value = value if self.value is None else torch.cat((self.value, value), 2)
        first = 0 if self.window is None else max(0, before - (self.window - 1))
        return self.key[:, :, first:], self.value[:, :, first:], first

    def crop(self, count: int) -> None:
        assert self.key is not None
        assert self.value is not None
        self.key, self.value = self.key[:, :, : self.length - count], self.value[:, :, : self.length - count]

    def select(self, rows: Tensor) -> None:
        assert self.key is not None
        assert self.value is not None
        self.key, self.value = self.key[rows], self.value[rows]


def check_held(layer: Any, reference: Reference) -> None:
    held = reference.length if reference.window is None else min(reference.length, reference.window - 1)
    if reference.key is not None and layer.keys is not None:
        assert torch.equal(layer.keys, reference.key[:, :, reference.length - held :])
        assert torch.equal(layer.values, reference.value[:, :, reference.length - held :])


OPERATION = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 12)),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("update"), st.just(1)),
    st.tuples(st.just("crop"), st.integers(1, 4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("mode"), st.sampled_from(["grad", "no_grad", "inference"])),
    st.tuples(st.just("copy"), st.sampled_from(["deepcopy", "pickle"])),
)
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


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


def check_shown(
    cache: Cache, window: int | None, key: Tensor, value: Tensor, reference: Reference, layer_idx: int
) -> None:
    """Update a layer; through the mask each query sees what it sees of everything ever appended, in order."""
    batch, past, count = key.shape[0], reference.length, key.shape[2]
    mask = build_mask(torch.zeros(batch, count, 1), None, None, cache, window=window, layer_idx=layer_idx)
    view = cache.key_view(count, layer_idx)
    positions = view.positions(torch.device("cpu"))
    keys, values = cache.update(key, value, layer_idx)
    reference.update(key, value)
    assert reference.key is not None
    assert reference.value is not None
    assert keys.shape[2] == values.shape[2] == mask.key_length == view.length
    assert torch.isfinite(keys).all()
    assert torch.isfinite(values).all()
    allowed = mask.allowed()
    for query in range(count):
        place = past + query
        rows = torch.ones(view.length, dtype=torch.bool) if allowed is None else allowed[0, 0, query]
        order = rows.nonzero()[:, 0][positions[rows].argsort()]
        first = 0 if window is None else max(0, place - window + 1)
        assert torch.equal(keys[:, :, order], reference.key[:, :, first : place + 1])
        assert torch.equal(values[:, :, order], reference.value[:, :, first : place + 1])


STATIC_OPERATION = st.one_of(
    OPERATION, st.tuples(st.just("captured"), st.integers(1, 3)), st.tuples(st.just("reset"), st.none())
)


@tiny.examples(150)
@given(st.one_of(st.none(), st.integers(1, 9)), st.lists(STATIC_OPERATION, min_size=1, max_size=30), st.booleans())
def test_any_sequence_on_a_static_cache_equals_concatenation(
    window: int | None, operations: list[tuple[str, Any]], allocated: bool
) -> None:
    """Also where steps are captured in a CUDA graph, as far as the host is concerned, and in every mode."""
    room = 40
    config = Shape(sliding_window=window, head_dim=WIDTH)
    cache: Cache = StaticCache(config, room)
    if allocated:
        for layer in cache.layers:
            layer.allocate(torch.empty(2, HEADS, 0, WIDTH), torch.empty(2, HEADS, 0, VALUE_WIDTH))
    references = [Reference(window), Reference(window)]
    generator = torch.Generator().manual_seed(0)
    batch, mode = 2, "no_grad"
    for name, argument in operations:
        length = references[0].length
        with MODES[mode]():
            if name == "mode" and argument != "grad":
                mode = argument
            elif name == "copy":
                cache = copy.deepcopy(cache) if argument == "deepcopy" else pickle.loads(pickle.dumps(cache))
            elif name == "reset":
                cache.reset()
                references = [Reference(window), Reference(window)]
            elif name == "update" and length + argument > room:
                for index in range(2):
                    with pytest.raises(GenerationError, match="room for 40 tokens"):
                        cache.update(*tokens(batch, argument, generator), index)
            elif name == "update" or (name == "captured" and cache.batch_size >= 0 and length + argument <= room):
                with pytest.MonkeyPatch.context() as patch:
                    if name == "captured":
                        patch.setattr(static_layers, "_capturing", lambda: True)
                    for index, reference in enumerate(references):
                        check_shown(cache, window, *tokens(batch, argument, generator), reference, index)
            elif name == "crop" and length:
                count = min(argument, length)
                try:
                    cache.crop(-count)
                except GenerationError:
                    assert window is not None
                    assert length > window
                else:
                    for reference in references:
                        reference.crop(count)
            elif name == "select" and length:
                rows = torch.tensor(argument) % batch
                cache.reorder_cache(rows)
                for reference in references:
                    reference.select(rows)
                batch = len(rows)
        if length == 0 and batch != 2:  # the memory has the old number of rows
            return
        assert cache.get_seq_length() == cache.get_seq_length(1) == references[0].length


def test_static_memory_is_fixed() -> None:
    static = StaticCache(Shape(head_dim=WIDTH), 16, batch_size=2, dtype=torch.float32)
    layer = static.layers[0]
    pointers = (layer.keys.data_ptr(), layer.seen.data_ptr())
    generator = torch.Generator().manual_seed(0)
    for step in range(16):
        with torch.no_grad() if step % 2 else torch.inference_mode():
            key = torch.randn(2, HEADS, 1, WIDTH, generator=generator)
            keys, _ = static.update(key, key, 0)
            assert keys.shape == (2, HEADS, 16 if step else 1, WIDTH)
            assert (layer.keys.data_ptr(), layer.seen.data_ptr()) == pointers
    with torch.no_grad():
        static.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(layer.keys[0], layer.keys[1])
        static.crop(10)
        assert static.get_seq_length() == int(layer.seen) == 10
        static.reset()
        assert static.get_seq_length() == int(layer.seen) == 0
    assert (layer.keys.data_ptr(), layer.seen.data_ptr()) == pointers
    sliding = StaticCache(Shape(sliding_window=4), 100, batch_size=2)
    assert sliding.layers[0].keys.shape[2] == 4
    assert sliding.get_max_length() == 100
    assert sliding.is_sliding == [True, True]
    assert StaticCache(Shape(sliding_window=90), 100).is_sliding == [False, False]  # a ring would save too little


def test_a_ring_is_not_cropped_once_it_has_turned() -> None:
    generator = torch.Generator().manual_seed(0)
    static = StaticCache(Shape(sliding_window=4), 100)
    with torch.no_grad():
        for index in range(2):
            static.update(*tokens(1, 4, generator), index)
        static.crop(-1)
        for index in range(2):
            static.update(*tokens(1, 3, generator), index)
    with pytest.raises(GenerationError, match="layer 0 has a sliding window"):
        static.crop(-1)
    assert static.get_seq_length() == 6


def test_the_host_does_not_ask_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a static cache wait for nothing, while the host runs them all."""
    generator = torch.Generator().manual_seed(0)
    for window in (None, 4):
        cache = StaticCache(Shape(sliding_window=window), 30)
        with torch.no_grad(), monkeypatch.context() as patch:
            for name in ("item", "__int__", "__bool__", "__index__", "tolist", "cpu"):
                patch.setattr(Tensor, name, lambda *_: pytest.fail("a step asked the device"))
            for count in (5, 1, 3, 1):
                mask = torch.ones(1, cache.get_seq_length() + count)
                for index in range(2):
                    build_mask(torch.zeros(1, count, 1), mask, None, cache, window=window, layer_idx=index).allowed()
                    cache.update(*tokens(1, count, generator), index)


def test_what_does_not_fit_a_static_cache() -> None:
    static = StaticCache(Shape(), 8, batch_size=2)
    key = torch.zeros(2, HEADS, 1, WIDTH)
    for wrong in (key[:1], key.double(), key[:, :1], key[..., :2]):
        with pytest.raises(GenerationError, match="build it with the model's dtype"):
            static.update(wrong, wrong, 0)


def test_a_capture_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_layers, "_capturing", lambda: True)
    for window in (None, 4):
        with pytest.raises(GenerationError, match="a CUDA graph needs a cache that is allocated"):
            StaticCache(Shape(sliding_window=window), 30).key_view(1)


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
