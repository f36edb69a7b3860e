"""When a row is finished, apart from its end token and its length."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import GenerationError

Criterion = Callable[[Tensor, Any], Any]


class StopStrings:
    """Which rows' new text contains one of some strings, called after every token.

    Decodes only as many of the last tokens as a string can span, so the cost of a step does not grow. A string may
    begin or end inside a token; it is not looked for in the prompt.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, prompt_length: int) -> None:
        if not hasattr(tokenizer, "decode"):
            raise GenerationError("stop_strings need tokenizer=, an object whose decode(ids) gives text")
        self.strings = tuple(strings)
        self.prompt_length = prompt_length
        self._tokenizer = tokenizer
        self._skip: dict[str, Any] = {"skip_special_tokens": False}
        # A token stands for one byte or more; a few more for a character cut in half at either end.
        self._span = max(len(text.encode()) for text in self.strings) + 8

    def _decode(self, ids: list[int]) -> str:
        try:
            return self._tokenizer.decode(ids, **self._skip)
        except TypeError:
            if not self._skip:
                raise
            self._skip = {}
            return self._tokenizer.decode(ids)

    def __call__(self, input_ids: Tensor, scores: Any = None) -> Tensor:
        length = input_ids.shape[1]
        begin = max(self.prompt_length, length - self._span)
        # Tokens before them tell the decoder how the first one is spaced.
        context = max(0, begin - 4)
        rows = input_ids[:, context:].tolist()
        return torch.tensor([self._found(row, begin - context) for row in rows], device=input_ids.device)

    def _found(self, ids: list[int], context: int) -> bool:
        text = self._decode(ids)
        before = len(self._decode(ids[:context]).rstrip("\ufffd")) if context else 0
        return any(text.find(string, before) >= 0 for string in self.strings)


def time_limit(seconds: float) -> Criterion:
    """All rows are finished once this much time has passed, from now on."""
    deadline = time.monotonic() + seconds
    return lambda input_ids, scores: time.monotonic() > deadline


def finished(criteria: Iterable[Criterion], input_ids: Tensor, scores: Any) -> Tensor:
    """(rows,) bool: rows that any criterion, returning a bool or a (rows,) tensor, calls finished."""
    result = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for criterion in criteria:
        verdict = criterion(input_ids, scores)
        if isinstance(verdict, Tensor):
            result = result | verdict.to(device=input_ids.device, dtype=torch.bool).reshape(-1)
        elif verdict:
            result = torch.ones_like(result)
    return result
