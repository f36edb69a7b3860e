"""One token a step: the best one (greedy) or one drawn (sampling)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import GenerationError
from .options import Options
from .output import GenerateOutput, Record
from .processors import Processor
from .runner import Runner
from .stopping import Criterion, finished


def decode(
    runner: Runner,
    options: Options,
    processors: Sequence[Processor],
    criteria: Sequence[Criterion],
    *,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[Tensor], Any] | None = None,
) -> GenerateOutput:
    """Extend every row until all are finished or max_length is reached.

    A finished row gets the pad token; ``on_tokens`` is called with the (rows,) tokens of each step.
    """
    record = Record(options)
    device = runner.ids.device
    eos = torch.tensor(options.eos, dtype=torch.long, device=device) if len(options.eos) > 1 else None
    can_finish = bool(options.eos or criteria)
    unfinished = torch.ones(runner.ids.shape[0], dtype=torch.bool, device=device)
    any_finished = False
    while True:
        logits = runner.logits()
        scores = logits
        for processor in processors:
            scores = processor(runner.sequences, scores)
        record.step(runner.outputs, logits, scores)
        tokens = runner.agreed(draw(scores, generator)) if options.do_sample else scores.argmax(dim=-1)
        if any_finished and options.pad is not None:
            tokens = tokens.where(unfinished, options.pad)
        runner.append(tokens)
        if on_tokens is not None:
            on_tokens(tokens.cpu())
        if can_finish:
            if options.eos:
                unfinished &= tokens != options.eos[0] if eos is None else ~torch.isin(tokens, eos)
            if criteria:
                unfinished &= ~finished(criteria, runner.sequences, record.scores and tuple(record.scores))
            any_finished = True
        # Asking whether anything goes on waits for the device, so not when the answer is known.
        if runner.length >= options.max_length or (can_finish and not bool(unfinished.any())):
            return GenerateOutput(sequences=runner.sequences, past_key_values=runner.cache, **record.fields())


def draw(scores: Tensor, generator: torch.Generator | None, count: int = 1) -> Tensor:
    """Tokens drawn from softmax(scores) without replacement: (rows,), or (rows, count) if count is not 1.

    Raises GenerationError when a row has nothing to draw from.
    """
    try:
        drawn = torch.multinomial(scores.softmax(dim=-1), count, generator=generator)
    except RuntimeError as error:
        if "probability" not in str(error) and "multinomial" not in str(error):
            raise
        raise GenerationError(
            "no token can be drawn: the scores of a row are all -inf, or not numbers. Loosen the options that hide"
            f" tokens, or check the model's logits ({error})"
        ) from error
    return drawn.squeeze(-1) if count == 1 else drawn
