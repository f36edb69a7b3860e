"""What each processor keeps and hides, and that the remembered repetition penalty equals the plain one."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loadstone.errors import GenerationError
from loadstone.models.generation import processors

SCORES = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20).map(lambda row: torch.tensor([row]))


def kept(scores: Tensor) -> Tensor:
    return scores.isfinite()


@tiny.examples(100)
@given(SCORES, st.integers(1, 25))
def test_top_k(scores: Tensor, count: int) -> None:
    result = processors.top_k(scores, count)
    assert int(kept(result).sum()) >= min(count, scores.shape[1])
    assert torch.equal(result[kept(result)], scores[kept(result)])
    worst_kept = result[kept(result)].min()
    assert not bool((scores[~kept(result)] >= worst_kept).any())


@tiny.examples(100)
@given(SCORES, st.floats(0.05, 0.95))
def test_top_p_keeps_just_enough(scores: Tensor, mass: float) -> None:
    probabilities = scores.double().softmax(-1)[0]
    result = kept(processors.top_p(scores, mass))[0]
    assert float(probabilities[result].sum()) >= mass - 1e-5
    assert float(probabilities[result].sum() - probabilities[result].min()) <= mass + 1e-5
    assert bool(result[scores[0].argmax()]) or int((scores == scores.max()).sum()) > 1


@tiny.examples(100)
@given(SCORES, st.floats(0.0, 1.0))
def test_min_p(scores: Tensor, share: float) -> None:
    probabilities = scores.softmax(-1)
    result = processors.min_p(scores, share)
    assert torch.equal(kept(result), (probabilities >= share * probabilities.max()) | (scores == scores.max()))


@tiny.examples(100)
@given(SCORES, st.integers(1, 4))
def test_at_least_so_many_are_kept(scores: Tensor, least: int) -> None:
    for change, value in ((processors.top_p, 1e-6), (processors.min_p, 1.0), (processors.typical_p, 1e-6)):
        assert int(kept(change(scores, value, least)).sum()) >= min(least, scores.shape[1])
    assert int(kept(processors.top_k(scores, 1, least)).sum()) >= min(least, scores.shape[1])


@tiny.examples(60)
@given(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=2, max_size=2), st.integers(3, 5))
def test_remembered_penalty_equals_the_plain_one(rows: list[list[int]], start: int) -> None:
    ids = torch.tensor(rows)
    first = torch.tensor([0, 2])
    remembering = processors.RepetitionPenalty(1.5, first)
    scores = torch.linspace(-2, 2, 20).view(2, 10)
    for length in range(start, 7):
        if length == 4:  # beams change places
            ids = ids.flip(0)
            first = first.flip(0)
            remembering.reorder(torch.tensor([1, 0]))
        seen = torch.zeros(2, 10, dtype=torch.bool)
        for row in range(2):
            seen[row, ids[row, int(first[row]) : length]] = True
        before = scores.clone()
        assert torch.equal(remembering(ids[:, :length], scores), processors.repetition_penalty(scores, seen, 1.5))
        assert torch.equal(before, scores)


@tiny.examples(100)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_no_sequence_repeats(ids: list[int], size: int) -> None:
    result = kept(processors.no_repeat_ngram(torch.zeros(1, 5), torch.tensor([ids]), size))[0]
    there = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
    for token in range(5):
        assert bool(result[token]) == (len(ids) < size or tuple([*ids, token][-size:]) not in there)


def test_bad_words() -> None:
    words = processors.BadWords([[1], [2, 3], [4, 2, 0]], torch.device("cpu"))
    ids = torch.tensor([[0, 4, 2], [0, 0, 4]])
    assert kept(words(ids, torch.zeros(2, 5))).tolist() == [
        [False, False, True, False, True],
        [True, False, True, True, True],
    ]
    with pytest.raises(GenerationError, match="token 4"):
        words(ids, torch.zeros(2, 4))


def test_simple_ones() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(processors.temperature(scores, 2.0), scores / 2)
    assert processors.hide(scores, torch.tensor([0, 2])).tolist() == [[float("-inf"), 2.0, float("-inf")]]
    torch.testing.assert_close(processors.renormalize(scores).exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("token", [11, 1 << 40, -1, -(1 << 40)])
def test_token_ids_that_are_none(token: int) -> None:
    """Hiding what cannot come changes nothing; a word to avoid or an end to force must be there."""
    scores = torch.randn(2, 11)
    assert processors.hide(scores, torch.tensor([token])).equal(scores)
    hidden = processors.hide(scores, torch.tensor([token, 3]))
    assert hidden[:, 3].isinf().all()
    assert hidden.isinf().sum() == 2
    with pytest.raises(GenerationError, match="forced_eos_token_id"):
        processors.force(scores, (token,))
    for words in ([token], [1, token], [token, 1]):
        with pytest.raises(GenerationError, match="bad_words_ids"):
            processors.BadWords([words], scores.device)(torch.tensor([[1], [2]]), scores)
