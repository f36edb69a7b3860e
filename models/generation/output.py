"""What `generate` returns when asked for more than the tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..outputs import ModelOutput


class GenerateOutput(ModelOutput):
    """sequences: (batch * num_return_sequences, length), int64, prompt included.
    scores, logits: for each step (rows, vocab), fp32, after and before processing; log-probabilities with beams.
    attentions, hidden_states: for each step what the model's forward gave. past_key_values: the cache.
    sequences_scores: (batch * num_return_sequences,), fp32, with beams. beam_indices: (batch * num_return_sequences,
    new), int32, the row each token came from, -1 after the end.
    """

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Any = None


class Record:
    """Collects what a `GenerateOutput` reports of each step."""

    def __init__(self, options: Any) -> None:
        wanted = options.return_dict
        self.scores: list[Tensor] | None = [] if wanted and options.output_scores else None
        self.logits: list[Tensor] | None = [] if wanted and options.output_logits else None
        self.attentions: list[Any] | None = [] if wanted and options.output_attentions else None
        self.hidden_states: list[Any] | None = [] if wanted and options.output_hidden_states else None

    def step(self, outputs: Any, logits: Tensor, scores: Tensor) -> None:
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.attentions is not None:
            self.attentions.append(outputs.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(outputs.hidden_states)

    def fields(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("scores", "logits", "attentions", "hidden_states")}
        return {name: None if value is None else tuple(value) for name, value in values.items()}
