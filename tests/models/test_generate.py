"""Generation: right by definition, the same whatever the cache, and no dearer late than early."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import ArgumentError, GenerationError
from loadstone.models.cache import DynamicCache
from loadstone.models.generation import GenerateOutput, GenerationConfig, generate, options
from loadstone.models.generation.stopping import StopStrings

VOCAB = 61
_models: dict[str, Any] = {}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Nothing here is large enough to be shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(kind: str = "llama") -> Any:
    """A small model without end token, made once."""
    if kind not in _models:
        _models[kind] = tiny.model(kind, attn_implementation="sdpa")
    _models[kind].generation_config = GenerationConfig()
    return _models[kind]


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy_by_definition(net: Any, row: Tensor, count: int) -> Tensor:
    for _ in range(count):
        row = torch.cat((row, net(row[None], use_cache=False).logits[0, -1].argmax()[None]))
    return row


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(
    "cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}]
)
def test_greedy_is_repeated_argmax(kind: str, cache: dict[str, Any]) -> None:
    prompt = ids(2, 7)
    expected = torch.stack([greedy_by_definition(model(kind), row, 15) for row in prompt])
    assert torch.equal(model(kind).generate(prompt, max_new_tokens=15, **cache), expected)


@tiny.examples(25)
@given(
    st.sampled_from(tiny.KINDS), st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 9), st.booleans()
)
def test_padded_rows_equal_single_rows(kind: str, lengths: list[int], seed: int, inferred: bool) -> None:
    rows = [ids(1, length, seed + index)[0] for index, length in enumerate(lengths)]
    width = max(lengths)
    batch = torch.stack([torch.cat((torch.zeros(width - len(row), dtype=torch.long), row)) for row in rows])
    given_mask = {"pad_token_id": 0} if inferred else {"attention_mask": (batch != 0).long()}
    result = model(kind).generate(batch, max_new_tokens=8, **given_mask)
    for row, out in zip(rows, result, strict=True):
        single = model(kind).generate(row[None], max_new_tokens=8)[0]
        assert torch.equal(out[width:], single[len(row) :])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_cache_does_not_change_the_result(kind: str, options: dict[str, Any]) -> None:
    prompt, mask = ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    results = []
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}):
        generator = torch.Generator().manual_seed(3)
        given_options = {"max_new_tokens": 12, **options, **cache}
        results.append(model(kind).generate(prompt, attention_mask=mask, generator=generator, **given_options))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_end_tokens_and_padding() -> None:
    prompt = ids(3, 4)
    free = model().generate(prompt, max_new_tokens=10)
    first, second = int(free[0, 6]), int(free[1, 9])
    result = model().generate(prompt, max_new_tokens=10, eos_token_id=[first, second], pad_token_id=0)
    for row, out in zip(free[:, 4:].tolist(), result[:, 4:].tolist(), strict=True):
        ends = [index for index, token in enumerate(row) if token in (first, second)]
        length = ends[0] + 1 if ends else len(row)
        assert out[:length] == row[:length][: len(out)]
        assert all(token == 0 for token in out[length:])
    assert result.shape[1] < free.shape[1] or free[2, 4:].tolist()
    alone = model().generate(prompt[:1], max_new_tokens=10, eos_token_id=first)
    assert alone[0, -1] == first
    assert alone.shape[1] <= 7
    longer = model().generate(prompt[:1], max_new_tokens=10, eos_token_id=first, min_new_tokens=5)
    assert first not in longer[0, 4:9]


def test_sampling_reproduces_with_a_generator() -> None:
    prompt = ids(2, 5)
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 1.5}
    one, two, other = (
        model().generate(prompt, generator=torch.Generator().manual_seed(seed), **options) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    model().generate(prompt, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    narrow = model().generate(prompt, max_new_tokens=12, do_sample=True, top_k=1)
    assert torch.equal(narrow, model().generate(prompt, max_new_tokens=12))


def test_sampling_follows_the_probabilities() -> None:
    prompt = ids(1, 3)
    expected = (model()(prompt).logits[0, -1].detach() / 0.7).softmax(-1)
    drawn = model().generate(
        prompt, max_new_tokens=1, do_sample=True, temperature=0.7, top_k=0, num_return_sequences=20000,
        generator=torch.Generator().manual_seed(0),
    )[:, -1]  # fmt: skip
    frequency = torch.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert float((frequency - expected).abs().max()) < 0.02


def test_one_beam_is_greedy_and_more_score_no_worse() -> None:
    prompt = ids(4, 5)

    def score(row: Tensor) -> float:
        logs = model()(row[None]).logits[0, 4:-1].detach().log_softmax(-1)
        return float(logs.gather(1, row[5:, None]).sum())

    greedy = model().generate(prompt, max_new_tokens=6)
    assert torch.equal(model().generate(prompt, max_new_tokens=6, num_beams=1), greedy)
    out = model().generate(
        prompt, max_new_tokens=6, num_beams=4, num_return_sequences=4, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert isinstance(out, GenerateOutput)
    assert out.sequences.shape == (16, 11)
    for row, reported in zip(out.sequences, out.sequences_scores.tolist(), strict=True):
        assert score(row) == pytest.approx(reported, abs=1e-3)
    assert all(score(out.sequences[4 * row]) >= score(greedy[row]) - 1e-4 for row in range(4))
    assert len({tuple(row) for row in out.sequences[:4].tolist()}) == 4


def test_exhaustive_beam_search_finds_the_best() -> None:
    """With as many beams as there are sequences, the best one is found."""
    net = tiny.model("llama", vocab_size=5, attn_implementation="sdpa")
    net.generation_config = GenerationConfig()
    prompt = torch.tensor([[1, 2]])
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)
    rows = torch.cat((prompt.expand(125, -1), every), dim=1)
    logs = net(rows).logits[:, 1:-1].log_softmax(-1).gather(2, rows[:, 2:, None]).sum((1, 2))
    best = net.generate(prompt, max_new_tokens=3, num_beams=25)
    assert torch.equal(best[0], rows[logs.argmax()])


class Letters:
    """Tokens are pieces of text; some hold several letters, one half of a character."""

    pieces = ["", "a", "b", "st", "op", "sto", "pper", "xst", " ", "\n", "é", "stop"]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces[token % len(self.pieces)] for token in tokens)


@tiny.examples(100)
@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=30),
    st.lists(st.sampled_from(["stop", "ab", "a b", "é", "pperst", " \n", "stopstopstopstop"]), min_size=1, max_size=3),
)
def test_stop_strings_stop_when_the_text_has_one(tokens: list[int], strings: list[str]) -> None:
    prompt = [3, 4, 5]
    criterion = StopStrings(strings, Letters(), len(prompt))
    for count in range(1, len(tokens) + 1):
        text = Letters().decode(tokens[:count])
        found = bool(criterion(torch.tensor([prompt + tokens[:count]]))[0])
        assert found == any(string in text for string in strings)
        if found:
            break


def test_stop_strings_see_the_space_before_the_first_new_token() -> None:
    """Some tokenizers drop the space that a text begins with."""

    class Stripping(Letters):
        def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
            assert not skip_special_tokens
            return super().decode(tokens).removeprefix(" ")

    criterion = StopStrings([" a"], Stripping(), 2)
    assert criterion(torch.tensor([[2, 2, 8, 1], [8, 1, 2, 1], [2, 8, 1, 2]])).tolist() == [True, False, False]


def test_stop_strings_decode_a_bounded_tail() -> None:
    longest = 0

    class Counting(Letters):
        def decode(self, tokens: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return super().decode(tokens)

    prompt = ids(2, 5)
    model().generate(prompt, max_new_tokens=50, stop_strings=["zzzz"], tokenizer=Counting())
    assert longest <= 20


def test_stop_strings_in_generation() -> None:
    prompt = ids(2, 5)
    free = model().generate(prompt, max_new_tokens=12)
    text = Letters().decode(free[0, 5:].tolist())
    wanted = next(text[i : i + 3] for i in range(2, len(text) - 3) if text[i : i + 3].strip())
    result = model().generate(prompt[:1], max_new_tokens=12, stop_strings=wanted, tokenizer=Letters())
    produced = Letters().decode(result[0, 5:].tolist())
    assert wanted in produced
    assert wanted not in Letters().decode(result[0, 5:-1].tolist())
    with pytest.raises(GenerationError, match="tokenizer"):
        model().generate(prompt, max_new_tokens=2, stop_strings="a")


def test_streaming() -> None:
    prompt = ids(2, 5)
    steps: list[Tensor] = []
    result = model().generate(prompt, max_new_tokens=6, streamer=steps.append)
    assert torch.equal(torch.stack(steps, dim=1), result[:, 5:])

    class Streamer:
        def __init__(self) -> None:
            self.received: list[Tensor] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.received.append(tokens)
            if len(self.received) == 100:
                raise RuntimeError("full")

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    model().generate(prompt, max_new_tokens=6, streamer=streamer)
    assert torch.equal(streamer.received[0], prompt)
    assert len(streamer.received) == 7
    assert streamer.ended
    streamer = Streamer()
    streamer.received = [prompt] * 97
    with pytest.raises(RuntimeError, match="full"):
        model().generate(prompt, max_new_tokens=6, streamer=streamer)
    assert streamer.ended
    with pytest.raises(GenerationError, match="beam"):
        model().generate(prompt, max_new_tokens=2, num_beams=2, streamer=streamer)
    with pytest.raises(ArgumentError, match="streamer"):
        model().generate(prompt, max_new_tokens=2, streamer=3)


def test_callers_processors_and_criteria() -> None:
    prompt = ids(2, 5)
    seen: list[tuple[int, int]] = []

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((input_ids.shape[1], scores.shape[1]))
        return torch.full_like(scores, float("-inf")).index_fill_(1, torch.tensor([input_ids.shape[1]]), 0.0)

    result = model().generate(prompt, max_new_tokens=4, logits_processor=[force])
    assert result[:, 5:].tolist() == [[5, 6, 7, 8]] * 2
    assert seen == [(5, VOCAB), (6, VOCAB), (7, VOCAB), (8, VOCAB)]
    for criterion in (lambda rows, scores: rows.shape[1] >= 7, lambda rows, scores: rows[:, -1] >= 6):
        stopped = model().generate(prompt, max_new_tokens=4, logits_processor=force, stopping_criteria=[criterion])
        assert stopped[:, 5:].tolist() == [[5, 6]] * 2
        beams = model().generate(
            prompt, max_new_tokens=4, num_beams=2, logits_processor=force, stopping_criteria=criterion
        )
        assert beams[:, 5:].tolist() == [[5, 6]] * 2
    assert model().generate(prompt, max_new_tokens=40, max_time=1e-9).shape[1] == 6


def test_outputs() -> None:
    net = tiny.model("llama", attn_implementation="eager")
    net.generation_config = GenerationConfig(return_dict_in_generate=True, output_logits=True, output_scores=True)
    prompt = ids(2, 5)
    out = net.generate(prompt, max_new_tokens=3, temperature=0.5, do_sample=True, output_attentions=True,
                       output_hidden_states=True, top_k=None, num_return_sequences=2, top_p=1.0)  # fmt: skip
    assert out.sequences.shape == (4, 8)
    assert len(out.logits) == len(out.scores) == len(out.attentions) == len(out.hidden_states) == 3
    assert out.attentions[0][0].shape == (4, 4, 5, 5)
    assert out.attentions[1][0].shape == (4, 4, 1, 6)
    assert out.hidden_states[2][0].shape == (4, 1, 32)
    assert out.past_key_values.get_seq_length() == 7
    plain = net(out.sequences[:, :6]).logits[:, -1]
    torch.testing.assert_close(out.logits[1], plain, rtol=1e-4, atol=1e-4)


def test_a_given_cache_is_continued() -> None:
    net, prompt = model("mistral"), ids(2, 9)
    whole = net.generate(prompt, max_new_tokens=8)
    cache = DynamicCache(net.config)
    net(prompt[:, :6], past_key_values=cache)
    fed: list[int] = []
    hook = net.model.embed_tokens.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    try:
        assert torch.equal(net.generate(prompt, past_key_values=cache, max_new_tokens=8), whole)
    finally:
        hook.remove()
    assert fed == [3] + [1] * 7
    beams = [
        net.generate(prompt, max_new_tokens=5, num_beams=2),
        net.generate(prompt, max_new_tokens=5, num_beams=2, past_key_values=filled(net, prompt[:, :4])),
    ]
    assert torch.equal(*beams)
    with pytest.raises(GenerationError, match="nothing is left to feed"):
        net.generate(prompt[:, :4], past_key_values=filled(net, prompt), max_new_tokens=2)
    with pytest.raises(GenerationError, match="rows"):
        net.generate(prompt[:1], past_key_values=filled(net, prompt[:, :4]), max_new_tokens=2)


def filled(net: Any, tokens: Tensor) -> DynamicCache:
    cache = DynamicCache(net.config)
    with torch.no_grad():
        net(tokens, past_key_values=cache)
    return cache


def test_embeddings_give_the_new_tokens_only() -> None:
    prompt = ids(2, 5)
    embeds = model().get_input_embeddings()(prompt)
    result = model().generate(inputs_embeds=embeds, max_new_tokens=6)
    assert torch.equal(result, model().generate(prompt, max_new_tokens=6)[:, 5:])
    assert not result.requires_grad


@pytest.mark.parametrize("mask", [None, torch.tensor([[0] * 2 + [1] * 6, [1] * 8])])
def test_a_step_costs_the_same_early_and_late(mask: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the model, and in the cache, no tensor that grows is written as a whole: counted in elements."""
    net = tiny.model("llama", max_position_embeddings=4096, num_hidden_layers=1)
    net.generation_config = GenerationConfig()
    written = [0]
    steps: list[int] = []
    copy, cat = Tensor.copy_, torch.cat

    def counting_copy(self: Tensor, source: Tensor, *args: Any) -> Tensor:
        written[0] += source.numel()
        return copy(self, source, *args)

    def counting_cat(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        result = cat(tensors, *args, **kwargs)
        written[0] += result.numel()
        return result

    monkeypatch.setattr(Tensor, "copy_", counting_copy)
    monkeypatch.setattr(torch, "cat", counting_cat)
    generate(net, ids(2, 8), attention_mask=mask, max_new_tokens=400, pad_token_id=0, repetition_penalty=1.1,
             streamer=lambda tokens: steps.append(written[0]))  # fmt: skip
    costs = [after - before for before, after in pairwise(steps)]
    usual = sorted(costs)[len(costs) // 2]
    assert sorted(costs)[-10] == usual  # all but a few steps, in which buffers grow
    assert sum(costs) < 12 * usual * len(costs)


def test_prompts_that_cannot_be() -> None:
    net, prompt = model(), ids(1, 3)
    for wrong in ([1, 2], prompt.float(), prompt[0], torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(ArgumentError, match="input_ids"):
            net.generate(wrong, max_new_tokens=1)
    with pytest.raises(ArgumentError, match="same thing"):
        net.generate(prompt, input_ids=prompt, max_new_tokens=1)
    with pytest.raises(GenerationError, match="empty"):
        net.generate(prompt[:, :0], max_new_tokens=1)
    with pytest.raises(GenerationError, match="attention_mask"):
        net.generate(prompt, attention_mask=torch.ones(1, 4), max_new_tokens=1)
    with pytest.raises(GenerationError, match="bos_token_id"):
        net.generate(max_new_tokens=1)
    with pytest.raises(ArgumentError, match="did you mean 'max_new_tokens'"):
        net.generate(prompt, max_newtokens=1)
    assert net.generate(max_new_tokens=2, bos_token_id=5)[0, 0] == 5
    assert torch.equal(net.generate(prompt.int(), max_new_tokens=1), net.generate(prompt, max_new_tokens=1))


def test_hiding_every_token_is_an_error_when_sampling() -> None:
    with pytest.raises(GenerationError, match="no token can be drawn"):
        model().generate(ids(1, 3), do_sample=True, max_new_tokens=2, suppress_tokens=list(range(VOCAB)))


def test_warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_warned", set())  # each is given once in a process
    caplog.set_level(logging.WARNING, logger="loadstone")
    prompt = torch.tensor([[5, 6, 0], [5, 6, 7]])
    model().generate(prompt, attention_mask=(prompt != 0).long(), pad_token_id=0, max_new_tokens=1)
    assert "padded on the right" in caplog.text
    with pytest.warns(UserWarning, match="20 new tokens"):
        assert model().generate(ids(1, 3)).shape == (1, 23)
    net = tiny.model("llama")
    net.train()
    net.generate(ids(1, 3), max_new_tokens=1)
    assert "training mode" in caplog.text
    assert net.training


def test_the_models_generation_config_counts() -> None:
    net, prompt = model(), ids(1, 3)
    free = net.generate(prompt, max_new_tokens=6)
    net.generation_config = GenerationConfig(max_new_tokens=6, eos_token_id=int(free[0, 5]))
    assert torch.equal(net.generate(prompt), free[:, : net.generate(prompt).shape[1]])
    assert net.generate(prompt).shape[1] <= 6
    assert net.generate(prompt, GenerationConfig(max_new_tokens=1)).shape[1] == 4
    assert net.generate(prompt, eos_token_id=None).shape[1] == 9
