"""What changes the scores of the next token before one is chosen.

The functions are pure: scores (rows, vocab), fp32, in; new scores out. `build` puts those that an `Options` asks for
in order, each as ``processor(input_ids, scores)`` with input_ids (rows, length), which is also the signature of what
callers add. Hidden tokens score -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import GenerationError
from .options import Options

Processor = Callable[[Tensor, Tensor], Tensor]
_HIDDEN = float("-inf")


def temperature(scores: Tensor, value: float) -> Tensor:
    """Divide: below 1 sharpens the distribution, above 1 flattens it."""
    return scores / value


def top_k(scores: Tensor, count: int, least: int = 1) -> Tensor:
    """Keep the ``count`` best tokens (and those equal to the last of them), at least ``least``."""
    count = min(max(count, least), scores.shape[-1])
    return scores.masked_fill(scores < torch.topk(scores, count).values[..., -1:], _HIDDEN)


def top_p(scores: Tensor, mass: float, least: int = 1) -> Tensor:
    """Keep the smallest set of best tokens whose probabilities reach ``mass``, at least ``least``."""
    ordered, order = torch.sort(scores, descending=False)
    remove = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1 - mass)
    remove[..., -least:] = False
    return scores.masked_fill(remove.scatter(-1, order, remove), _HIDDEN)


def min_p(scores: Tensor, share: float, least: int = 1) -> Tensor:
    """Keep tokens at least ``share`` times as probable as the best one, at least ``least``."""
    probabilities = scores.softmax(dim=-1)
    remove = probabilities < share * probabilities.amax(dim=-1, keepdim=True)
    best = torch.topk(probabilities, min(least, scores.shape[-1]), dim=-1).indices
    return scores.masked_fill(remove.scatter(-1, best, False), _HIDDEN)


def typical_p(scores: Tensor, mass: float, least: int = 1) -> Tensor:
    """Keep the tokens whose information is nearest to the expected one, up to ``mass``. (arXiv:2202.00666)"""
    logs = scores.log_softmax(dim=-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    distance, order = torch.sort((-logs - entropy).abs(), descending=False)
    reached = scores.gather(-1, order).softmax(dim=-1).cumsum(dim=-1) < mass
    last = reached.sum(dim=-1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    remove = distance > distance.gather(-1, last)
    remove[..., :least] = False
    return scores.masked_fill(remove.scatter(-1, order, remove), _HIDDEN)


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Worsen tokens marked in ``seen`` (rows, vocab), bool. (arXiv:1909.05858)"""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(scores: Tensor, input_ids: Tensor, size: int) -> Tensor:
    """Hide tokens that would repeat a sequence of ``size`` tokens."""
    length = input_ids.shape[1]
    if length < size:
        return scores
    windows = input_ids.unfold(1, size, 1)
    repeats = (windows[..., :-1] == input_ids[:, None, length + 1 - size :]).all(dim=-1)
    vocab = scores.shape[-1]
    # One more column takes what must not be hidden, and ids that have no score.
    hidden = scores.new_zeros((scores.shape[0], vocab + 1), dtype=torch.bool)
    hidden.scatter_(1, windows[..., -1].clamp(max=vocab).where(repeats, vocab), True)
    return scores.masked_fill(hidden[:, :vocab], _HIDDEN)


def hide(scores: Tensor, tokens: Tensor) -> Tensor:
    """Hide these tokens, (count,) ids, in every row; ids that no score belongs to cannot come anyway."""
    vocab = scores.shape[-1]
    hidden = torch.zeros(vocab + 1, dtype=torch.bool, device=scores.device)
    hidden.index_fill_(0, tokens.where((tokens >= 0) & (tokens < vocab), vocab), True)
    return scores.masked_fill(hidden[:vocab], _HIDDEN)


def force(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Hide all tokens but these. Raises GenerationError if there is no such token."""
    vocab = scores.shape[-1]
    if not all(0 <= token < vocab for token in tokens):
        raise GenerationError(f"forced_eos_token_id={list(tokens)}: the model has tokens from 0 to {vocab - 1}")
    return torch.full_like(scores, _HIDDEN).index_fill_(-1, torch.tensor(tokens, device=scores.device), 0.0)


def renormalize(scores: Tensor) -> Tensor:
    """Log-probabilities."""
    return scores.log_softmax(dim=-1)


class RepetitionPenalty:
    """`repetition_penalty` over all tokens of a row but its left padding; remembers what it has seen.

    first: (rows,) index of the first real token of each row, None if there is no padding.
    """

    def __init__(self, penalty: float, first: Tensor | None) -> None:
        self.penalty = penalty
        self.first = first
        self._seen: Tensor | None = None
        self._length = -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocab = scores.shape[-1]
        if self._seen is None or input_ids.shape[1] != self._length + 1:
            ids = input_ids
            if self.first is not None:
                before = torch.arange(ids.shape[1], device=ids.device) < self.first[:, None]
                ids = ids.masked_fill(before, vocab)
            self._seen = scores.new_zeros((scores.shape[0], vocab + 1), dtype=torch.bool)
        else:
            ids = input_ids[:, -1:]
        self._seen.scatter_(1, ids.clamp(max=vocab), True)
        self._length = input_ids.shape[1]
        return repetition_penalty(scores, self._seen[:, :vocab], self.penalty)

    def reorder(self, rows: Tensor) -> None:
        if self._seen is not None:
            self._seen = self._seen.index_select(0, rows)
        if self.first is not None:
            self.first = self.first.index_select(0, rows)


class BadWords:
    """Hides the last token of each forbidden sequence where the tokens before it are already there."""

    def __init__(self, sequences: Iterable[Sequence[int]], device: torch.device) -> None:
        groups: dict[int, list[Sequence[int]]] = {}
        for sequence in sequences:
            groups.setdefault(len(sequence) - 1, []).append(sequence)
        named = [token for group in groups.values() for sequence in group for token in sequence]
        self._lowest, self._highest = min(named, default=0), max(named, default=0)
        self._single = torch.tensor([s[0] for s in groups.pop(0, [])], dtype=torch.long, device=device)
        self._longer = [
            (torch.tensor([s[:-1] for s in group], device=device), torch.tensor([s[-1] for s in group], device=device))
            for group in groups.values()
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._highest >= scores.shape[-1] or self._lowest < 0:
            wrong = self._lowest if self._lowest < 0 else self._highest
            raise GenerationError(f"bad_words_ids names token {wrong}, the model has {scores.shape[-1]}")
        scores = hide(scores, self._single)
        for prefixes, last in self._longer:
            if prefixes.shape[1] <= input_ids.shape[1]:
                found = (input_ids[:, None, -prefixes.shape[1] :] == prefixes).all(dim=-1)
                hidden = torch.zeros_like(scores, dtype=torch.int8).index_add_(1, last, found.to(torch.int8))
                scores = scores.masked_fill(hidden > 0, _HIDDEN)
        return scores


def build(
    options: Options, *, prompt_length: int, first: Tensor | None, device: torch.device, custom: Iterable[Processor]
) -> list[Processor]:
    """The processors of one call, in order: penalties and prohibitions, the caller's own, then those of sampling."""
    eos = torch.tensor(options.eos, dtype=torch.long, device=device)
    result: list[Processor] = []
    if options.repetition_penalty != 1.0:
        result.append(RepetitionPenalty(options.repetition_penalty, first))
    if options.no_repeat_ngram_size > 0:
        result.append(lambda ids, scores: no_repeat_ngram(scores, ids, options.no_repeat_ngram_size))
    words = [sequence for sequence in options.bad_words_ids if not (len(sequence) == 1 and sequence[0] in options.eos)]
    if words:
        result.append(BadWords(words, device))
    if options.eos and options.min_length > prompt_length:
        result.append(lambda ids, scores: hide(scores, eos) if ids.shape[1] < options.min_length else scores)
    if options.forced_eos:
        forced = options.forced_eos
        result.append(lambda ids, scores: force(scores, forced) if ids.shape[1] == options.max_length - 1 else scores)
    if options.suppress_tokens:
        suppressed = torch.tensor(options.suppress_tokens, dtype=torch.long, device=device)
        result.append(lambda ids, scores: hide(scores, suppressed))
    if options.begin_suppress_tokens:
        begin = torch.tensor(options.begin_suppress_tokens, dtype=torch.long, device=device)
        result.append(lambda ids, scores: hide(scores, begin) if ids.shape[1] == prompt_length else scores)
    result.extend(custom)
    if options.do_sample:
        result.extend(_sampling(options))
    if options.renormalize_logits:
        result.append(lambda ids, scores: renormalize(scores))
    return result


def _sampling(options: Options) -> list[Processor]:
    # Beams need a way on beside each end token.
    least = 1 if options.num_beams == 1 else max(2, len(options.eos) + 1)
    steps: list[tuple[bool, Callable[..., Tensor], tuple[Any, ...]]] = [
        (options.temperature != 1.0, temperature, (options.temperature,)),
        (options.top_k != 0, top_k, (options.top_k, least)),
        (options.top_p < 1.0, top_p, (options.top_p, least)),
        (options.min_p is not None, min_p, (options.min_p, least)),
        (options.typical_p < 1.0, typical_p, (options.typical_p, least)),
    ]
    return [_without_ids(change, *values) for wanted, change, values in steps if wanted]


def _without_ids(change: Callable[..., Tensor], *values: Any) -> Processor:
    return lambda ids, scores: change(scores, *values)
