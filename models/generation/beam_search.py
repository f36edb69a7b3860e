"""Beam search, batched; the tokens and scores that other implementations of it give.

Hypotheses are not stored as token rows: each step keeps the chosen tokens and the beam they continue, a finished
hypothesis the step and beam it ends at, and only what is returned is read back. So a step costs the same early and
late. Rows of all tokens are kept besides only if a processor or criterion wants to read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import GenerationError
from .decoding import draw
from .options import Options
from .output import GenerateOutput, Record
from .processors import Processor
from .runner import Runner
from .stopping import Criterion, finished

_NEVER = -1.0e9


@dataclass
class Finished:
    """The best finished hypotheses, each field (batch, beams): score, whether it is one at all, the step of its last
    token (-1: none), the beam that token continues, and the token."""

    score: Tensor
    real: Tensor
    step: Tensor
    parent: Tensor
    token: Tensor

    def merged(self, other: Finished, keep: int) -> Finished:
        """The ``keep`` best of both."""
        best = torch.cat((self.score, other.score), dim=1).topk(keep).indices
        fields = self.__dataclass_fields__
        return Finished(
            *(torch.cat((getattr(self, name), getattr(other, name)), dim=1).gather(1, best) for name in fields)
        )


class BeamSearch:
    """One search over a batch; see `beam_search`."""

    def __init__(self, runner: Runner, options: Options, batch: int) -> None:
        self.runner, self.options, self.batch, self.beams = runner, options, batch, options.num_beams
        self.device = device = runner.ids.device
        self.prompt_length = runner.length
        # Enough candidates that as many beams as wanted go on, even if each one's best tokens end it.
        self.candidates = max(2, 1 + len(options.eos)) * self.beams
        self.eos = torch.tensor(options.eos, dtype=torch.long, device=device)
        self.offsets = torch.arange(batch, device=device)[:, None] * self.beams
        self.identity = torch.arange(batch * self.beams, device=device)
        # All beams begin alike: only the first may be continued at the first step.
        self.running = torch.full((batch, self.beams), _NEVER, device=device)
        self.running[:, 0] = 0.0
        empty = torch.zeros((batch, self.beams), dtype=torch.long, device=device)
        self.done = Finished(
            torch.full((batch, self.beams), _NEVER, device=device), empty.bool(), empty - 1, empty, empty
        )
        self.improvable = torch.ones((batch, 1), dtype=torch.bool, device=device)
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []

    def choose(self, scores: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probability, beam, token), each (batch, candidates), of the best continuations or of drawn ones."""
        vocab = scores.shape[-1]
        total = (scores.view(self.batch, self.beams, vocab) + self.running[..., None]).view(self.batch, -1)
        if self.options.do_sample:
            index = self.runner.agreed(draw(total, generator, self.candidates))
            score, order = total.gather(1, index).sort(dim=1, descending=True)  # the best first, as `advance` expects
            index = index.gather(1, order)
        else:
            if self.candidates > total.shape[1]:
                raise GenerationError(
                    f"{self.beams} beams need {self.candidates} candidates, there are {total.shape[1]}"
                )
            score, index = total.topk(self.candidates)
        return score, index // vocab, index % vocab

    def ends(self, beam: Tensor, token: Tensor, criteria: Sequence[Criterion], scores: Any) -> Tensor:
        """(batch, candidates), bool: which continuations end their hypothesis."""
        length = self.runner.length
        if length + 1 >= self.options.max_length:
            return torch.ones_like(token, dtype=torch.bool)
        result = torch.isin(token, self.eos)
        if criteria:
            rows = self.runner.ids[(beam + self.offsets).view(-1), : length + 1]
            rows[:, length] = token.view(-1)
            result = result | finished(criteria, rows, scores).view_as(result)
        return result

    def advance(self, score: Tensor, beam: Tensor, token: Tensor, ended: Tensor) -> None:
        """Choose the beams that go on, and keep the best finished ones."""
        step = len(self.tokens)
        going = score + ended.float() * _NEVER
        best = going.topk(self.beams).indices
        self.running = going.gather(1, best)
        self.tokens.append(token.gather(1, best))
        self.parents.append(beam.gather(1, best))

        stop_when_full = self.options.early_stopping is True
        final = score / ((step + 1) ** self.options.length_penalty)
        if stop_when_full:
            final = final + self.done.real.all(dim=1, keepdim=True).float() * _NEVER
        final = final + (~self.improvable).float() * _NEVER
        # Only the first `beams` candidates may end: the others are there so that enough can go on.
        ended = ended.clone()
        ended[:, self.beams :] = False
        final = final + (~ended).float() * _NEVER
        new = Finished(final, ended, torch.full_like(token, step), beam, token)
        self.done = self.done.merged(new, self.beams)

    def goes_on(self, ended: Tensor) -> bool:
        """Whether a better hypothesis is possible, allowed and reachable."""
        options = self.options
        length = len(self.tokens)
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = options.max_length - self.prompt_length
        possible = self.running[:, :1] / (length**options.length_penalty)
        worst = self.done.score.amin(dim=1, keepdim=True).where(self.done.real, _NEVER)
        self.improvable = self.improvable & (possible > worst).any(dim=1, keepdim=True)
        more = self.improvable.any() & ~ended.all()
        if options.early_stopping is True:
            more = more & ~self.done.real.all()
        return bool(more)

    def continue_rows(self, keep_sequences: bool) -> None:
        """Make the model's rows those of the chosen beams."""
        rows = (self.parents[-1] + self.offsets).view(-1)
        if not torch.equal(rows, self.identity):
            self.runner.reorder(rows, sequences=keep_sequences)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sequences, scores, beam indices) of the num_return_sequences best of each row."""
        count, options = self.options.num_return_sequences, self.options
        step, beam, token = (getattr(self.done, name)[:, :count] for name in ("step", "parent", "token"))
        longest = int(step.max()) + 1
        # What follows the end of a shorter hypothesis; a pad token of 0 counts as none, as elsewhere.
        fill = (options.pad or options.eos[0]) if options.eos else options.pad if options.pad is not None else -1
        new = torch.full((self.batch, count, longest), fill, dtype=torch.long, device=self.device)
        origin = torch.full((self.batch, count, longest), -1, dtype=torch.long, device=self.device)
        for index in reversed(range(longest)):
            before = step > index  # here the hypothesis is still one of the running beams
            token = torch.where(before, self.tokens[index].gather(1, beam), token)
            beam = torch.where(before, self.parents[index].gather(1, beam), beam)
            new[..., index] = token.where(step >= index, fill)
            origin[..., index] = (beam + self.offsets).where(step >= index, -1)
        prompt = self.runner.prompt.ids[:, None].expand(-1, count, -1)
        sequences = torch.cat((prompt, new), dim=2).flatten(0, 1)
        return sequences, self.done.score[:, :count].flatten(), origin.flatten(0, 1).to(torch.int32)


def beam_search(
    runner: Runner,
    options: Options,
    processors: Sequence[Processor],
    criteria: Sequence[Criterion],
    *,
    batch: int,
    generator: torch.Generator | None = None,
) -> GenerateOutput:
    """Keep the ``num_beams`` likeliest hypotheses of each row; with do_sample, continuations are drawn instead.

    A hypothesis scores its summed log-probabilities over length ** length_penalty, new tokens counted.
    """
    search, record = BeamSearch(runner, options, batch), Record(options)
    keep_sequences = bool(processors or criteria)
    while True:
        logits = runner.logits()
        scores = logits.log_softmax(dim=-1)
        for processor in processors:
            scores = processor(runner.sequences, scores)
        record.step(runner.outputs, logits, scores)
        score, beam, token = search.choose(scores, generator)
        ended = search.ends(beam, token, criteria, record.scores and tuple(record.scores))
        search.advance(score, beam, token, ended)
        more = search.goes_on(ended)
        if more or options.return_dict:
            search.continue_rows(keep_sequences)
        if not more:
            break
        for processor in processors:
            if hasattr(processor, "reorder"):
                processor.reorder((search.parents[-1] + search.offsets).view(-1))
        runner.append(search.tokens[-1].view(-1))
    sequences, final, origin = search.result()
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=final if options.output_scores else None,
        beam_indices=origin,
        past_key_values=runner.cache,
        **record.fields(),
    )
