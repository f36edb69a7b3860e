"""Generation gives the tokens and scores that transformers gives with the same weights."""

from __future__ import annotations

import functools
import random
import warnings
from typing import Any

import pytest
import tiny
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import ArgumentError
from loadstone.models.generation import GenerationConfig, processors
from loadstone.models.generation.options import merge, resolve
from loadstone.models.gpt2 import GPT2Config, GPT2LMHeadModel
from loadstone.models.llama import LlamaConfig, LlamaForCausalLM
from loadstone.models.mistral import MistralConfig, MistralForCausalLM

transformers = pytest.importorskip("transformers")
VOCAB, POSITIONS = 41, 64
FAMILIES = ("llama", "gpt2", "mistral")


@functools.cache
def twins(family: str) -> tuple[Any, Any]:
    """(ours, the peer's) with the same weights, far from uniform."""
    shape = {"vocab_size": VOCAB, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4}
    shape |= {"max_position_embeddings": POSITIONS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    wide = {"num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.25, "tie_word_embeddings": False}
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        if family == "llama":
            ours: Any = LlamaForCausalLM(LlamaConfig(**shape, **wide))
            peer: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **wide))
        elif family == "mistral":
            ours = MistralForCausalLM(MistralConfig(**shape, **wide, head_dim=4, sliding_window=4))
            peer = transformers.MistralForCausalLM(
                transformers.MistralConfig(**shape, **wide, head_dim=4, sliding_window=4)
            )
        else:
            ours = GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.25))
            peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, initializer_range=0.25))
    peer.load_state_dict(ours.state_dict())
    ours.generation_config = GenerationConfig()
    peer.generation_config = transformers.GenerationConfig()
    return ours.eval(), peer.eval()


TOKEN = st.integers(0, VOCAB - 1)
COMMON = {
    "max_new_tokens": st.integers(1, 12),
    "eos_token_id": st.one_of(st.none(), TOKEN, st.lists(TOKEN, min_size=1, max_size=6, unique=True)),
    "pad_token_id": st.one_of(st.none(), TOKEN),
    "min_new_tokens": st.one_of(st.none(), st.integers(0, 6)),
    "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    "no_repeat_ngram_size": st.sampled_from([0, 0, 1, 2, 3]),
    "bad_words_ids": st.one_of(st.none(), st.lists(st.lists(TOKEN, min_size=1, max_size=2), min_size=1, max_size=4)),
    "suppress_tokens": st.one_of(st.none(), st.lists(TOKEN, min_size=1, max_size=3)),
    "use_cache": st.sampled_from([True, True, False]),
    "cache_implementation": st.sampled_from([None, None, "static"]),
    "renormalize_logits": st.booleans(),
}
SAMPLING = {
    "temperature": st.sampled_from([1.0, 0.5, 1.7]),
    "top_k": st.sampled_from([0, 5, 50]),
    "top_p": st.sampled_from([1.0, 0.8, 0.3]),
    "min_p": st.sampled_from([None, 0.05, 0.5]),
    "typical_p": st.sampled_from([1.0, 0.6]),
}
RARELY = {name: COMMON[name] for name in ("pad_token_id", "min_new_tokens", "use_cache", "cache_implementation")}
RARELY |= {name: COMMON[name] for name in ("repetition_penalty", "no_repeat_ngram_size")}


@st.composite
def prompts(draw: Any) -> tuple[Tensor, Tensor | None]:
    """(input_ids, attention_mask or None), rows padded on the left."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    width = max(lengths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = torch.randint(0, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    return ids, mask if draw(st.booleans()) else None


def beams(seed: int) -> dict[str, Any]:
    """Options under which hypotheses end at all kinds of moments, or their handling would not show."""
    chosen = random.Random(seed)
    count = chosen.randint(2, 4)
    return {
        "num_beams": count,
        "num_return_sequences": chosen.randint(1, count),
        "length_penalty": chosen.choice([1.0, 0.0, 0.5, 2.0, -1.0]),
        "early_stopping": chosen.choice([True, False, "never"]),
        "eos_token_id": chosen.sample(range(VOCAB), chosen.randint(1, 12)),
        "max_new_tokens": chosen.randint(2, 12),
    }


def run(family: str, ids: Tensor, mask: Tensor | None, options: dict[str, Any], seed: int = 0) -> tuple[Any, Any]:
    ours, peer = twins(family)
    options = options | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    if not options.get("use_cache", True):
        options["cache_implementation"] = None
    results = []
    for model in (ours, peer):
        given = dict(options)
        if model is peer:
            given["disable_compile"] = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            results.append(model.generate(ids, attention_mask=mask, **given))
    return results[0], results[1]


def compare(ours: Any, peer: Any) -> None:
    assert ours.sequences.tolist() == peer.sequences.tolist()
    for name in ("scores", "logits"):
        mine, theirs = getattr(ours, name), getattr(peer, name)
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@tiny.examples(60)
@given(st.sampled_from(FAMILIES), prompts(), st.fixed_dictionaries({}, optional=COMMON))
def test_greedy(family: str, prompt: tuple[Tensor, Tensor | None], options: dict[str, Any]) -> None:
    compare(*run(family, *prompt, {"max_new_tokens": 6} | options))


@tiny.examples(40)
@given(
    st.sampled_from(FAMILIES),
    prompts(),
    st.fixed_dictionaries({}, optional=COMMON | SAMPLING),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_sampling_with_the_same_seed(
    family: str, prompt: tuple[Tensor, Tensor | None], options: dict[str, Any], copies: int, seed: int
) -> None:
    options = {"max_new_tokens": 6} | options | {"do_sample": True, "num_return_sequences": copies}
    compare(*run(family, *prompt, options, seed))


@tiny.examples(120)
@given(
    st.sampled_from(FAMILIES), prompts(), st.integers(0, 9999).map(beams), st.fixed_dictionaries({}, optional=RARELY)
)
def test_beam_search(
    family: str, prompt: tuple[Tensor, Tensor | None], options: dict[str, Any], others: dict[str, Any]
) -> None:
    check_beams(*run(family, *prompt, others | options))


@tiny.examples(25)
@given(
    st.sampled_from(FAMILIES),
    prompts(),
    st.fixed_dictionaries({}, optional=RARELY),
    st.integers(0, 999),
)
def test_beam_sampling_with_the_same_seed(
    family: str, prompt: tuple[Tensor, Tensor | None], options: dict[str, Any], seed: int
) -> None:
    # Filters may leave fewer tokens than there are candidates to draw, which is an error here and there.
    options = options | beams(seed) | {"do_sample": True, "top_k": 0, "temperature": 1.5}
    check_beams(*run(family, *prompt, options, seed))


def check_beams(ours: Any, peer: Any) -> None:
    compare(ours, peer)
    torch.testing.assert_close(ours.sequences_scores, peer.sequences_scores, rtol=1e-4, atol=1e-5)
    assert ours.beam_indices.tolist() == peer.beam_indices.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_continuing_a_cache(family: str) -> None:
    """A second call with the first one's cache feeds only what is new, whether given the whole text or its end."""
    first = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    more = torch.tensor([[1, 2, 3], [4, 5, 6]])
    outcomes = []
    for model in twins(family):
        start = model.generate(first, max_new_tokens=4, return_dict_in_generate=True)
        whole = torch.cat((start.sequences, more), dim=1)
        out = model.generate(
            whole, past_key_values=start.past_key_values, max_new_tokens=5, return_dict_in_generate=True
        )
        assert out.past_key_values.get_seq_length() == whole.shape[1] + 4
        ids, fresh = whole[:, -4:], None
        fresh = model.generate(first, max_new_tokens=4, return_dict_in_generate=True).past_key_values
        mask = torch.ones(2, fresh.get_seq_length() + 4, dtype=torch.long)
        tail = model.generate(ids, attention_mask=mask, past_key_values=fresh, max_new_tokens=5)
        assert torch.equal(tail[:, 4:], out.sequences[:, whole.shape[1] :])
        outcomes.append(out.sequences)
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"max_length": 12}, {"repetition_penalty": 1.5}])
def test_embeddings_as_prompt(options: dict[str, Any]) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    outcomes = []
    for model in twins("llama"):
        embeds = model.get_input_embeddings()(ids).detach()
        given = {"max_new_tokens": 5} | options
        if "max_length" in options:
            del given["max_new_tokens"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.append(model.generate(inputs_embeds=embeds, **given))
    assert outcomes[0].tolist() == outcomes[1].tolist()


@pytest.mark.parametrize("options", [{}, {"max_length": 9}, {"max_length": 9, "max_new_tokens": 2}, {"min_length": 8}])
def test_lengths(options: dict[str, Any]) -> None:
    ids = torch.arange(50).remainder(VOCAB)[None] if not options else torch.tensor([[3, 4, 5]])
    outcomes = []
    for model in twins("gpt2"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.append(model.generate(ids, eos_token_id=7, **options))
    assert outcomes[0].tolist() == outcomes[1].tolist()


# Processors


@st.composite
def scored(draw: Any) -> tuple[Tensor, Tensor]:
    """(input_ids, scores), with ties and hidden tokens among the scores."""
    rows, vocab, length = draw(st.integers(1, 3)), draw(st.integers(2, 30)), draw(st.integers(1, 9))
    value = st.sampled_from([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.5, 7.0, float("-inf")])
    drawn = st.one_of(value, st.floats(-9, 9, width=32))
    scores = torch.tensor([draw(st.lists(drawn, min_size=vocab, max_size=vocab)) for _ in range(rows)])
    assume(bool(scores.isfinite().any(dim=1).all()))
    ids = torch.tensor(
        [draw(st.lists(st.integers(0, vocab + 1), min_size=length, max_size=length)) for _ in range(rows)]
    )
    return ids, scores


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@tiny.examples(200)
@given(scored(), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(1, 3), st.sampled_from([0.3, 1.5, 2.0]))
def test_processors_give_the_same_values(
    batch: tuple[Tensor, Tensor], count: int, share: float, least: int, factor: float
) -> None:
    ids, scores = batch
    kinds = transformers.generation.logits_process
    same(processors.temperature(scores, factor), kinds.TemperatureLogitsWarper(factor)(ids, scores))
    same(processors.top_k(scores, count, least), kinds.TopKLogitsWarper(count, min_tokens_to_keep=least)(ids, scores))
    same(processors.top_p(scores, share, least), kinds.TopPLogitsWarper(share, min_tokens_to_keep=least)(ids, scores))
    same(processors.min_p(scores, share, least), kinds.MinPLogitsWarper(share, min_tokens_to_keep=least)(ids, scores))
    same(
        processors.typical_p(scores, share, least),
        kinds.TypicalLogitsWarper(share, min_tokens_to_keep=least)(ids, scores),
    )
    same(processors.no_repeat_ngram(scores, ids, least), kinds.NoRepeatNGramLogitsProcessor(least)(ids, scores))
    same(
        processors.RepetitionPenalty(factor, None)(ids, scores),
        kinds.RepetitionPenaltyLogitsProcessor(factor)(ids, scores),
    )
    first = torch.arange(ids.shape[0]) % ids.shape[1]
    same(
        processors.RepetitionPenalty(factor, first)(ids, scores),
        kinds.RepetitionPenaltyLogitsProcessor(factor, prompt_ignore_length=first)(ids, scores),
    )
    hidden = torch.tensor([0, scores.shape[1] - 1])
    same(processors.hide(scores, hidden), kinds.SuppressTokensLogitsProcessor(hidden)(ids, scores))
    words = [[0], [1], [*ids[0, -1:].clamp(max=scores.shape[1] - 1).tolist(), 1]]
    same(processors.BadWords(words, ids.device)(ids, scores), kinds.NoBadWordsLogitsProcessor(words)(ids, scores))


@tiny.examples(60)
@given(st.fixed_dictionaries({}, optional=COMMON | SAMPLING), scored())
def test_the_chain_has_the_same_order(options: dict[str, Any], batch: tuple[Tensor, Tensor]) -> None:
    ids, _ = batch
    ids = ids.clamp(max=VOCAB - 1)
    scores = torch.randn(ids.shape[0], VOCAB, generator=torch.Generator().manual_seed(len(options)))
    options = {"max_new_tokens": 9, "do_sample": True} | options | {"use_cache": True}
    ours, peer = twins("llama")
    resolved = resolve(
        merge(ours.generation_config, None, options), prompt_length=ids.shape[1], embeds_length=None, max_positions=None
    )
    chain = processors.build(
        resolved, prompt_length=ids.shape[1], first=None, device=ids.device, custom=[lambda _, s: s.clamp(max=1.5)]
    )
    mine = scores
    for processor in chain:
        mine = processor(ids, mine)

    config, _ = peer._prepare_generation_config(None, **options)
    peer._prepare_special_tokens(config, True, device="cpu")

    class Custom(transformers.LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.clamp(max=1.5)

    theirs = peer._get_logits_processor(
        config, input_ids_seq_length=ids.shape[1], logits_processor=[Custom()], device="cpu", model_kwargs={}
    )
    same(mine, theirs(ids, scores))


def test_the_peers_generation_config() -> None:
    """Given to generate or set on the model: what it sets counts, what it does not comes from the model."""
    model = tiny.model("llama")
    ids = torch.arange(5)[None]
    theirs = transformers.GenerationConfig(max_new_tokens=4, num_beams=2, eos_token_id=60, pad_token_id=0)
    want = model.generate(ids, max_new_tokens=4, num_beams=2, eos_token_id=60, pad_token_id=0)
    assert torch.equal(model.generate(ids, generation_config=theirs), want)
    assert torch.equal(model.generate(ids, generation_config=theirs, max_new_tokens=2), want[:, :7])
    model.generation_config = theirs
    assert isinstance(model.generation_config, GenerationConfig)
    assert torch.equal(model.generate(ids), want)
    for wrong in ({"max_new_tokens": 4}, 4, "greedy"):
        with pytest.raises(ArgumentError, match="must be a GenerationConfig"):
            model.generate(ids, generation_config=wrong)
