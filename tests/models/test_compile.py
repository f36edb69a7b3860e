"""Compiled forwards give what eager ones give, in one graph, and a static cache makes one of them do for every step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from loadstone import DynamicCache, StaticCache
from loadstone.errors import ArgumentError, GenerationError
from loadstone.models import static_layers

kinds = pytest.mark.parametrize("kind", tiny.KINDS)
both = pytest.mark.parametrize("implementation", ["eager", "sdpa"])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROOM = 48
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
                 "original_max_position_embeddings": 12},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def one_layer(kind: str, implementation: str) -> Any:
    """A model where depth would add nothing but time."""
    return tiny.model(kind, 0, implementation, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": 1})


def compiled(model: Any, backend: str = "eager") -> tuple[Any, Any]:
    """The model compiled whole, and what counts the compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def left_padding(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A mask (batch, length) whose row r begins with r hidden tokens, and the positions."""
    mask = (torch.arange(length) >= torch.arange(batch)[:, None]).long()
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


def greedy(
    step: Any, cache: Any, logits: Tensor, steps: int, *, mask: Tensor | None = None, whole_mask: bool = False
) -> list[Tensor]:
    """The tokens of ``steps`` steps that follow ``logits`` (batch, seq, vocab)."""
    chosen = [logits[:, -1].argmax(-1)]
    seen = cache.get_seq_length()
    for _ in range(steps):
        seen += 1
        given: dict[str, Any] = {}
        if mask is not None:
            given["attention_mask"] = mask if whole_mask else mask[:, :seen]
            given["position_ids"] = mask[:, :seen].sum(-1, keepdim=True) - 1
        with torch.no_grad():
            chosen.append(step(chosen[-1][:, None], past_key_values=cache, **given).logits[:, -1].argmax(-1))
    return chosen


@both
@kinds
def test_training(kind: str, implementation: str) -> None:
    model = one_layer(kind, implementation).train()
    for dropout in [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]:
        dropout.p = 0.0
    model.config.attn_pdrop = 0.0
    ids = tokens(2, 12)
    step, counter = compiled(model, "aot_eager")
    results = []
    for forward in (model, step):
        model.zero_grad()
        loss = forward(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    assert counter.frame_count == 1


@both
@kinds
def test_evaluation(kind: str, implementation: str) -> None:
    """Plain, padded, packed."""
    model = one_layer(kind, implementation)
    ids, step = tokens(3, 12), compiled(model)[0]
    mask, positions = left_padding(3, 12)
    packed = torch.cat([torch.arange(length) for length in (5, 4, 3)])[None]
    for given in ({}, {"attention_mask": mask, "position_ids": positions}, {"position_ids": packed}):
        with torch.no_grad():
            expected, got = model(ids, **given).logits, step(ids, **given).logits
        torch.testing.assert_close(got, expected, **CLOSE)


@kinds
def test_a_growing_cache_can_be_filled(kind: str) -> None:
    model = tiny.model(kind, 0, "sdpa")
    ids, step = tokens(2, 9), compiled(model)[0]
    caches = [DynamicCache(model.config), DynamicCache(model.config)]
    with torch.no_grad():
        logits = [
            forward(ids, past_key_values=cache).logits for forward, cache in zip((model, step), caches, strict=True)
        ]
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    for a, b in zip(*(greedy(model, cache, logits[0], 8) for cache in caches), strict=True):
        assert torch.equal(a, b)


@both
@kinds
def test_one_compilation_decodes_everything(kind: str, implementation: str) -> None:
    """Steps after prompts of several lengths, each in a cache of its own: one graph, and eager's tokens."""
    model = tiny.model(kind, 0, implementation)
    step, counter = compiled(model, "aot_eager")
    for length, steps in ((5, 30), (12, 8)):
        ids = tokens(2, length, seed=length)
        growing, static = DynamicCache(model.config), StaticCache(model.config, ROOM)
        with torch.no_grad():
            logits = [model(ids, past_key_values=cache).logits for cache in (growing, static)]
        expected = greedy(model, growing, logits[0], steps)
        got = greedy(step, static, logits[1], steps)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        assert static.get_seq_length() == growing.get_seq_length() == length + steps
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("whole", [False, True])
def test_padded_prompts(kind: str, whole: bool) -> None:
    """A mask with one entry for each token that there is room for costs nothing, a growing one a compilation more."""
    model = one_layer(kind, "sdpa")
    step, counter = compiled(model)
    ids = tokens(3, 7)
    mask, positions = left_padding(3, ROOM)
    growing, static = DynamicCache(model.config), StaticCache(model.config, ROOM)
    with torch.no_grad():
        logits = [
            model(ids, attention_mask=mask[:, :7], position_ids=positions[:, :7], past_key_values=cache).logits
            for cache in (growing, static)
        ]
    expected = greedy(model, growing, logits[0], 12, mask=mask)
    got = greedy(step, static, logits[1], 12, mask=mask, whole_mask=whole)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert counter.frame_count == (1 if whole else 2)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_compiled_and_eager_steps_take_turns(kind: str) -> None:
    """Prompt, chunks and single tokens, compiled or not, and a second text in the same memory."""
    model = one_layer(kind, "sdpa")
    step, counter = compiled(model)
    cache = StaticCache(model.config, ROOM)
    ids = tokens(2, 40)
    for _ in range(2):
        pieces = []
        with torch.no_grad():
            expected = model(ids).logits
            for begin, end, forward in (
                (0, 7, step), (7, 8, step), (8, 9, model), (9, 12, model), (12, 15, step), (15, 16, step),
                (16, 19, step), (19, 20, model), (20, 21, step), (21, 29, step), (29, 40, model),
            ):  # fmt: skip
                pieces.append(forward(ids[:, begin:end], past_key_values=cache).logits)
                if end % 2:
                    assert cache.get_seq_length() == end
        torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)
        cache.reset()
    assert counter.frame_count <= 5  # prompt, one token, 3 tokens, any number, and what of it the second text adds


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_rotary_types_that_follow_the_length(rope: str) -> None:
    """The tables change on the way; the host does not know when."""
    model = tiny.model("llama", 0, "sdpa", num_hidden_layers=1, max_position_embeddings=16, rope_parameters=ROPES[rope])
    step, counter = compiled(model)
    ids = tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(step(ids).logits, model(ids).logits, **CLOSE)
        growing, static = DynamicCache(model.config), StaticCache(model.config, ROOM)
        for cache in (growing, static):
            model(ids, past_key_values=cache)
        before = counter.frame_count
        for token in tokens(30, 2, 1):
            expected = model(token, past_key_values=growing).logits
            torch.testing.assert_close(step(token, past_key_values=static).logits, expected, **CLOSE)
        assert counter.frame_count == before + 1
        long = tokens(2, 20)
        torch.testing.assert_close(step(long).logits, model(long).logits, **CLOSE)


def test_learned_positions_are_not_exceeded() -> None:
    """Eagerly the length counts; compiled, where nobody knows it, the room of the cache."""
    model = tiny.model("gpt2", 0, "sdpa", n_positions=8)
    cache = StaticCache(model.config, 10)
    with torch.no_grad():
        model(tokens(1, 7), past_key_values=cache)
        with pytest.raises(Exception, match="can reach position 10, GPT-2 has learned 8"):
            compiled(model)[0](tokens(1, 1), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        with pytest.raises(ArgumentError, match="can reach position 9"):
            model(tokens(1, 1), past_key_values=cache)


def test_a_full_cache() -> None:
    """Compiled, the device finds out; the host does at the next eager step."""
    model = tiny.model("llama", 0, "sdpa")
    step, _ = compiled(model)
    cache = StaticCache(model.config, 8)
    with torch.no_grad():
        model(tokens(1, 7), past_key_values=cache)
        step(tokens(1, 1), past_key_values=cache)
        with pytest.raises(GenerationError, match="room for 8 tokens and has seen 8"):
            model(tokens(1, 1), past_key_values=cache)
        with pytest.raises((IndexError, RuntimeError), match=r"index|range"):
            step(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize("taken", [3, 12])
def test_memory_allocated_by_a_compiled_step_in_inference_mode(taken: int) -> None:
    """It can be written to outside of that mode, cropped and reset."""
    model = one_layer("llama", "sdpa")
    step, ids, cache = compiled(model, "aot_eager")[0], tokens(2, 12), StaticCache(model.config, ROOM)
    with torch.inference_mode():
        step(ids, past_key_values=cache)
    with torch.no_grad():
        if taken == 12:
            cache.reset()
        else:
            cache.crop(-taken)
        got = model(ids[:, 12 - taken :], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits[:, 12 - taken :], **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_compiler_does_not_believe_a_captured_cache_empty(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays of a CUDA graph pass the host by, also the first ones after a reset."""
    model = one_layer(kind, "sdpa")
    step, ids, cache = compiled(model)[0], tokens(2, 12), StaticCache(model.config, ROOM)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(static_layers, "_capturing", lambda: True)
            model(ids[:, :1], past_key_values=cache)
        cache.reset()
        host = copy.copy(vars(cache.layers[0]))
        model(ids[:, :4], past_key_values=cache)  # stands for replays
        vars(cache.layers[0]).update(host)
        got = step(ids[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids).logits[:, 4:], **CLOSE)


@kinds
def test_generation(kind: str) -> None:
    """A compiled model generates in a static cache what it generates eagerly: one graph for the prompt, one beyond."""
    model = one_layer(kind, "sdpa")
    ids = tokens(2, 6)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, fullgraph=True)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor() -> None:
    model = tiny.model("mistral", 0, "sdpa", num_hidden_layers=1)
    step, counter = compiled(model, "inductor")
    ids = tokens(1, 5)
    growing, static = DynamicCache(model.config), StaticCache(model.config, ROOM)
    with torch.no_grad():
        logits = [model(ids, past_key_values=cache).logits for cache in (growing, static)]
    expected, got = greedy(model, growing, logits[0], 20), greedy(step, static, logits[1], 20)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert counter.frame_count == 1
