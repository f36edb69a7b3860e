"""Feeds the model: the prompt once, then one token a row, without copying what is already there."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ...errors import GenerationError
from ...loading.memory import check_memory
from ..cache import DynamicCache, StaticCache
from .inputs import Prompt
from .options import Options, warn_once


class Runner:
    """The state of one call to `generate`: sequences so far, mask, positions and cache.

    Every prompt row becomes ``copies`` rows after the prompt has been fed (once). ``ids`` is (rows * copies,
    max_length), of which ``length`` is filled. ``company``: the other ranks of a model on a device mesh.
    """

    def __init__(
        self, model: Any, prompt: Prompt, options: Options, *, copies: int, cache: Any = None, company: Any = None
    ) -> None:
        self.model = model
        self.company = company
        self.prompt = prompt
        self.options = options
        self.copies = copies
        self.length = prompt.ids.shape[1]
        self.outputs: Any = None
        rows = prompt.rows * copies
        self._accepted = _accepted(model)
        self._known = prompt.known
        self._hidden = prompt.known - self.length  # cached or embedded tokens that are not in ids
        total = options.max_length + self._hidden
        self.cache = self._prepare_cache(cache, total)
        self._check_room(rows, new=self.cache if cache is None else None)
        self.ids = prompt.ids.new_empty((rows, options.max_length))
        self.ids[:, : self.length] = _repeat(prompt.ids, copies)
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        if prompt.mask is not None:
            self._mask = prompt.mask.new_ones((rows, total))
            self._mask[:, : prompt.known] = _repeat(prompt.mask, copies)
        if prompt.mask is not None and not {"attention_mask", "position_ids"} <= self._accepted:
            raise GenerationError(
                f"{type(model).__name__}.forward takes no attention_mask or no position_ids, so it cannot continue"
                " padded prompts; generate row by row"
            )
        self._limit = getattr(model.config, "max_position_embeddings", None)

    def _prepare_cache(self, cache: Any, total: int) -> Any:
        if not self.options.use_cache or "past_key_values" not in self._accepted:
            if cache is not None:
                raise GenerationError("past_key_values was given, but use_cache=False or the model takes no cache")
            if self.prompt.embeds is not None:
                raise GenerationError("inputs_embeds need a cache to remember them, which the model does not take")
            return None
        rows = self.prompt.rows
        if cache is not None:
            held = cache.batch_size
            if held == rows * self.copies and held != rows:
                raise GenerationError(
                    f"past_key_values holds {held} rows for {rows} prompts; pass the cache of the prompts, generate()"
                    " repeats it itself"
                )
            if held not in (-1, rows):
                raise GenerationError(f"past_key_values holds {held} rows, the prompt has {rows}")
            return cache
        if self.options.static_cache:
            return StaticCache(self.model.config, max(total - 1, 1))
        return DynamicCache(self.model.config, expected_length=max(total - 1, 1))

    def _check_room(self, rows: int, new: Any) -> None:
        """MemoryLimitError for lengths that no memory holds: they may come from a file. new: the cache just made."""
        ids, longest = self.prompt.ids, self.options.max_length
        size = rows * longest * ids.itemsize
        if isinstance(new, StaticCache):
            size += new.memory_needed(rows, self.model.dtype)
        check_memory(size, f"generating {rows} sequences of up to {longest} tokens", ids.device)

    @property
    def sequences(self) -> Tensor:
        """(rows, length): a view of all tokens so far."""
        return self.ids[:, : self.length]

    def append(self, tokens: Tensor) -> None:
        """Add one token (rows,) to each row."""
        self.ids[:, self.length] = tokens
        self.length += 1
        self._known += 1

    def agreed(self, drawn: Tensor) -> Tensor:
        """What was drawn, alike on all ranks that share this model's work."""
        return drawn if self.company is None else self.company.agreed(drawn)

    def reorder(self, rows: Tensor, *, sequences: bool) -> None:
        """Row i goes on from the old row ``rows[i]``; the sequences too, if anything reads them."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        if sequences or self.cache is None:
            self.ids[:, : self.length] = self.ids[:, : self.length].index_select(0, rows)

    def logits(self) -> Tensor:
        """(rows, vocab), fp32: the next token's logits; feeds what the model has not seen yet."""
        if self._limit is not None and self._known > self._limit:
            warn_once(f"the sequence is now longer than the {self._limit} positions the model was made for")
        with torch.no_grad():
            outputs = self._step() if self.outputs is not None else self._prefill()
        self.outputs = outputs
        return outputs.logits[:, -1].to(device=self.ids.device, dtype=torch.float32)

    def _prefill(self) -> Any:
        prompt, repeat = self.prompt, self.copies
        # Attentions and hidden states are reported for every row; without a cache every row is fed each time anyway.
        early = self.copies > 1 and (self.options.output_attentions or self.options.output_hidden_states)
        now = repeat if early else 1
        if early and self.cache is not None:
            self.cache.batch_repeat_interleave(repeat)
        begin = prompt.known - prompt.feed
        source = prompt.ids if prompt.embeds is None else prompt.embeds
        source = _repeat(source[:, -prompt.feed :], now)
        positions = prompt.positions if prompt.positions is None else _repeat(prompt.positions, now)
        mask = prompt.mask if prompt.mask is None else _repeat(prompt.mask, now)
        size = self.options.prefill_chunk_size if self.cache is not None else None
        for first in range(0, prompt.feed, size or prompt.feed):
            last = min(first + (size or prompt.feed), prompt.feed)
            outputs = self._call(
                source[:, first:last],
                None if mask is None else mask[:, : begin + last],
                None if positions is None else positions[..., first:last],
                embeds=prompt.embeds is not None,
            )
        if repeat > 1 and not early:
            outputs.logits = _repeat(outputs.logits[:, -1:], repeat)
            if self.cache is not None:
                self.cache.batch_repeat_interleave(repeat)
        if positions is not None:
            own = _repeat(positions, 1 if now == repeat else repeat)
            # With a cache only the last one is needed to go on.
            self._positions = own if self.cache is None else own[:, -1:].clone()
        return outputs

    def _step(self) -> Any:
        if self._positions is not None:
            following = self._positions[:, -1:] + 1
            self._positions = following if self.cache is not None else torch.cat((self._positions, following), dim=1)
        tokens = self.sequences if self.cache is None else self.ids[:, self.length - 1 : self.length]
        return self._call(tokens, None if self._mask is None else self._mask[:, : self._known], self._positions)

    def _call(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, *, embeds: bool = False) -> Any:
        given: dict[str, Any] = {
            "inputs_embeds" if embeds else "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": self.cache is not None,
            "logits_to_keep": 1,
            "return_dict": True,
            "output_attentions": self.options.output_attentions or None,
            "output_hidden_states": self.options.output_hidden_states or None,
        }
        given = {name: value for name, value in given.items() if value is not None and name in self._accepted}
        if self.company is not None:
            self.company.step()
        outputs = self.model(**given)
        if self.cache is not None and getattr(outputs, "past_key_values", None) is not None:
            self.cache = outputs.past_key_values
        return outputs


_EVERYTHING = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
)


def _accepted(model: Any) -> frozenset[str]:
    """Names of what the model's forward takes, of all that generation could pass."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "past_key_values" not in parameters:
        return _EVERYTHING  # a wrapper that passes everything on
    return frozenset(parameters) & _EVERYTHING


def _repeat(tensor: Tensor, copies: int) -> Tensor:
    return tensor if copies == 1 else tensor.repeat_interleave(copies, dim=0)
