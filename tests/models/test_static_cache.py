"""A static cache shows every query what it may see, whatever was done before, at addresses that never change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import tiny
import torch
from cache_reference import HEADS, MODES, OPERATION, VALUE_WIDTH, WIDTH, Reference, Shape, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import GenerationError, MemoryLimitError
from loadstone.models import static_layers
from loadstone.models.cache import Cache, StaticCache
from loadstone.models.masks import build_mask


def check_shown(
    cache: Cache, window: int | None, key: Tensor, value: Tensor, reference: Reference, layer_idx: int
) -> None:
    """Update a layer; through the mask each query sees what it sees of everything ever appended, in order."""
    batch, past, count = key.shape[0], reference.length, key.shape[2]
    mask = build_mask(torch.zeros(batch, count, 1), None, None, cache, window=window, layer_idx=layer_idx)
    view = cache.key_view(count, layer_idx)
    positions = view.positions(torch.device("cpu"))
    assert 0 <= int(mask.query_start) <= mask.key_length - (1 if view.newest is not None else count)
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
    OPERATION,
    st.tuples(st.sampled_from(["capture", "replay"]), st.integers(1, 3)),
    st.tuples(st.just("reset"), st.none()),
)


@contextmanager
def captured(cache: Cache, *, replay: bool) -> Iterator[None]:
    """What a CUDA graph means to the host: a capture it runs, a replay it never hears of."""
    names = ("_known", "_empty", "_captured")
    before = [[getattr(layer, name) for name in names] for layer in cache.layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_layers, "_capturing", lambda: True)
        yield
    for layer, host in zip(cache.layers, before, strict=True):
        for name, value in zip(names, host, strict=True):
            if replay:
                setattr(layer, name, value)


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
    batch, mode, in_graph = 2, "no_grad", False
    for name, argument in operations:
        length = references[0].length
        fits = length + argument <= room if name in ("update", "capture", "replay") else False
        with MODES[mode]():
            if name == "mode" and argument != "grad":
                mode = argument
            elif name == "copy":
                cache = copy.deepcopy(cache) if argument == "deepcopy" else pickle.loads(pickle.dumps(cache))
            elif name == "reset":
                cache.reset()
                references = [Reference(window), Reference(window)]
            elif name == "update" and not fits:
                for index in range(2):
                    with pytest.raises(GenerationError, match="room for 40 tokens"):
                        cache.update(*tokens(batch, argument, generator), index)
            elif fits and (name == "update" or (cache.batch_size >= 0 and (name == "capture" or in_graph))):
                in_graph = in_graph or name == "capture"
                with nullcontext() if name == "update" else captured(cache, replay=name == "replay"):
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


@pytest.mark.parametrize("first_mode", [0, 1])
@pytest.mark.parametrize("allocated", [False, True])
def test_static_memory_is_fixed(allocated: bool, first_mode: int) -> None:
    """From the first update on, in whatever mode that is."""
    static = StaticCache(Shape(head_dim=WIDTH), 16, batch_size=2 if allocated else None, dtype=torch.float32)
    layer, pointers = static.layers[0], set()
    if allocated:
        pointers.add((layer.keys.data_ptr(), layer.seen.data_ptr()))
    generator = torch.Generator().manual_seed(0)
    for step in range(16):
        with torch.no_grad() if (step + first_mode) % 2 else torch.inference_mode():
            key = torch.randn(2, HEADS, 1, WIDTH, generator=generator)
            keys, _ = static.update(key, key, 0)
            assert keys.shape == (2, HEADS, 16 if step else 1, WIDTH)
            pointers.add((layer.keys.data_ptr(), layer.seen.data_ptr()))
    with torch.no_grad():
        static.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(layer.keys[0], layer.keys[1])
        static.crop(10)
        assert static.get_seq_length() == int(layer.seen) == 10
        static.reset()
        assert static.get_seq_length() == int(layer.seen) == 0
    assert pointers == {(layer.keys.data_ptr(), layer.seen.data_ptr())}
    sliding = StaticCache(Shape(sliding_window=4), 100, batch_size=2)
    assert sliding.layers[0].keys.shape[2] == 4
    assert sliding.get_max_length() == 100
    assert sliding.is_sliding == [True, True]
    assert StaticCache(Shape(sliding_window=90), 100).is_sliding == [False, False]  # a ring would save too little


@tiny.examples(60)
@given(st.sampled_from(tiny.KINDS), st.integers(1, 90), st.integers(1, 3), st.sampled_from([None, 1, 5, 80]))
def test_the_memory_needed_is_what_is_taken(kind: str, room: int, rows: int, window: int | None) -> None:
    more = {"sliding_window": window} if kind == "mistral" else {}
    config = tiny.CONFIGS[kind].from_dict(tiny.values(kind, **more))
    for dtype in (torch.float32, torch.bfloat16):
        static = StaticCache(config, room, batch_size=rows, dtype=dtype)
        taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in static.layers)
        assert StaticCache(config, room).memory_needed(rows, dtype) == static.memory_needed(rows, dtype) == taken


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_generating_counts_the_memory_it_takes(kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that grows nothing is taken beforehand."""
    counted: list[int] = []
    monkeypatch.setattr("loadstone.models.generation.runner.check_memory", lambda size, *_: counted.append(size))
    made = tiny.model(kind).generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=40, num_beams=2, do_sample=False, return_dict_in_generate=True,
        eos_token_id=None, cache_implementation=implementation,
    )  # fmt: skip
    layers = made.past_key_values.layers if implementation == "static" else ()
    assert counted == [2 * 43 * 8 + sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)]


def test_configurations_that_do_not_say_how_many_heads_there_are() -> None:
    class Bare:
        num_hidden_layers = 2

    static = StaticCache(Bare(), 8)
    assert static.memory_needed(3, torch.float32) == 0
    key = torch.randn(1, 2, 3, 4)
    assert static.update(key, key, 1)[0].shape == key.shape
    with pytest.raises(GenerationError, match="leave out batch_size"):
        StaticCache(Bare(), 8, batch_size=1)


def test_an_accelerator_with_more_memory_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is not refused for the machine's sake, what no device holds still is."""
    from loadstone.loading import memory

    device = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "memory_limit", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 3000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory.check_memory(6000, "it", device)
    for place in (None, torch.device("cpu"), torch.device("mps")):
        with pytest.raises(MemoryLimitError, match="1000 bytes of memory"):
            memory.check_memory(1001, "it", place)
    with pytest.raises(MemoryLimitError, match="6000 bytes of memory"):
        memory.check_memory(6001, "it", device)


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
