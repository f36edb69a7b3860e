"""Decoding in CUDA graphs, captured by hand and by torch.compile: replays run without the host and must be right."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from loadstone import DynamicCache, StaticCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
kinds = pytest.mark.parametrize("kind", tiny.KINDS)
ROOM = 48


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def eager(model: Any, prompt: Tensor, steps: int) -> list[Tensor]:
    """The tokens of greedy decoding in a growing cache."""
    cache = DynamicCache(model.config)
    chosen = [model(prompt, past_key_values=cache).logits[:, -1].argmax(-1)]
    for _ in range(steps):
        chosen.append(model(chosen[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
    return chosen


@kinds
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_step_captured_by_hand(kind: str, implementation: str) -> None:
    """One graph continues prompts of several lengths in the same memory; the window's ring turns on the way."""
    model = tiny.model(kind, 0, implementation).cuda()
    cache = StaticCache(model.config, ROOM, batch_size=2, device="cuda", dtype=model.dtype)
    token, graph = torch.zeros(2, 1, dtype=torch.long, device="cuda"), torch.cuda.CUDAGraph()
    model(tokens(2, 3), past_key_values=cache)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(token, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        following = model(token, past_key_values=cache).logits[:, -1].argmax(-1)
    for length in (5, 12):
        cache.reset()
        prompt = tokens(2, length, seed=length)
        chosen = [model(prompt, past_key_values=cache).logits[:, -1].argmax(-1)]
        for step in range(20):
            token.copy_(chosen[-1][:, None])
            graph.replay()
            chosen.append(following.clone())
            if step % 7 == 0:
                assert cache.get_seq_length() == length + step + 1
        assert torch.equal(torch.stack(chosen), torch.stack(eager(model, prompt, 20)))


@pytest.mark.slow
@kinds
@torch.no_grad()
def test_reduce_overhead(kind: str) -> None:
    """torch.compile's own graphs: the cache stays where it is, and one compilation does for all steps."""
    torch._dynamo.reset()
    model = tiny.model(kind, 0, "sdpa").cuda()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for length in (5, 12):
        prompt = tokens(2, length, seed=length)
        cache = StaticCache(model.config, ROOM, batch_size=2, device="cuda", dtype=model.dtype)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        chosen = [model(prompt, past_key_values=cache).logits[:, -1].argmax(-1)]
        for _ in range(20):
            torch.compiler.cudagraph_mark_step_begin()
            chosen.append(step(chosen[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1).clone())
        assert torch.equal(torch.stack(chosen), torch.stack(eager(model, prompt, 20)))
        assert [layer.keys.data_ptr() for layer in cache.layers] == places
        assert cache.get_seq_length() == length + 20


@kinds
@torch.no_grad()
def test_steps_of_a_static_cache_do_not_wait(kind: str) -> None:
    model = tiny.model(kind, 0, "sdpa").cuda()
    cache = StaticCache(model.config, ROOM)
    prompt, token = tokens(2, 9), tokens(2, 1)
    model(prompt, past_key_values=cache)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            model(token, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert cache.get_seq_length() == 19
