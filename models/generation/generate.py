"""`generate`: continue prompts with a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, GenerationError
from ..cache import one_spelling
from .beam_search import beam_search
from .company import company_of
from .configuration import GenerationConfig
from .decoding import decode
from .inputs import prepare_prompt, prompt_tensors
from .options import Options, merge, resolve, warn_once
from .output import GenerateOutput
from .processors import Processor, build
from .runner import Runner
from .stopping import Criterion, StopStrings, time_limit


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Iterable[Processor] | Processor | None = None,
    stopping_criteria: Iterable[Criterion] | Criterion | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Continue each row of input_ids by greedy decoding, sampling or beam search.

    inputs, input_ids (the same thing): (batch, seq), int64. attention_mask: (batch, seq), 1 = keep, padding on the
        left; without it, pad tokens are taken for padding unless they are also the end token.
    inputs_embeds: (batch, seq, hidden_size) in place of input_ids; then only the new tokens are returned.
    past_key_values (or by its newer name, cache): a cache that holds the beginning of input_ids, or what comes before
        them if attention_mask covers both; it is filled further.
    generation_config, and any of its fields as keyword arguments, which win; what neither says comes from
        ``model.generation_config``. Without max_new_tokens or max_length, 20 new tokens.
    logits_processor: callables (input_ids, scores) -> scores. stopping_criteria: callables (input_ids, scores) -> bool
        or (rows,) bool.
    generator: the source of randomness when sampling; default torch's own.
    streamer: an object with put(tokens) and end(), given the prompt and then each step's tokens; or a callable given
        each step's (rows,) tokens, on the CPU. tokenizer: decodes, for stop_strings.
    Returns (batch * num_return_sequences, length), int64, finished rows filled with the pad token; with
    return_dict_in_generate a `GenerateOutput`. Raises GenerationError, ArgumentError.
    """
    _refuse_other_inputs(model)
    company = company_of(model)
    with company or nullcontext():  # whatever fails on this rank, others that generate with it are not left waiting
        merged = merge(model.generation_config, GenerationConfig.of(generation_config), kwargs)
        ids, embeds = prompt_tensors(inputs, input_ids, inputs_embeds, merged["bos_token_id"], model.device)
        options = resolve(
            merged,
            prompt_length=ids.shape[1],
            embeds_length=None if embeds is None else embeds.shape[1],
            max_positions=getattr(model.config, "max_position_embeddings", None),
        )
        cache = one_spelling(past_key_values, cache)
        past = 0 if cache is None else cache.get_seq_length()
        prompt = prepare_prompt(ids, embeds, attention_mask, position_ids, past=past, pad=options.pad, eos=options.eos)
        copies = max(options.num_beams, options.num_return_sequences)
        first = None if prompt.mask is None else (prompt.mask != 0).int().argmax(dim=1).repeat_interleave(copies)
        custom = _as_list(logits_processor, "logits_processor")
        processors = build(options, prompt_length=ids.shape[1], first=first, device=ids.device, custom=custom)
        criteria = _criteria(options, tokenizer, ids.shape[1])
        criteria += _as_list(stopping_criteria, "stopping_criteria")
        runner = Runner(model, prompt, options, copies=copies, cache=cache, company=company)
        result = _run(runner, options, processors, criteria, generator, streamer)
    assert result.sequences is not None
    return result if options.return_dict else result.sequences


@torch.no_grad()
def _run(
    runner: Runner,
    options: Options,
    processors: list[Processor],
    criteria: list[Criterion],
    generator: torch.Generator | None,
    streamer: Any,
) -> GenerateOutput:
    if runner.model.training:
        warn_once("generate() on a model in training mode: dropout stays active; call model.eval() first")
    if options.num_beams == 1:
        return _stream(runner, options, processors, criteria, generator, streamer)
    if streamer is not None:
        raise GenerationError("beam search only knows its tokens at the end: streamer needs num_beams=1")
    return beam_search(runner, options, processors, criteria, batch=runner.prompt.rows, generator=generator)


def _refuse_other_inputs(model: Any) -> None:
    """GenerationError for a model whose ``prepare_inputs_for_generation`` somebody has replaced, to no effect."""
    replaced = vars(model).get("prepare_inputs_for_generation")
    if replaced is not None and replaced.__func__ is not type(model).prepare_inputs_for_generation:
        raise GenerationError(
            "generate() builds its own inputs and would ignore prepare_inputs_for_generation, which "
            f"{type(replaced.__self__).__name__} put in place of the model's (prompt tuning does); LoRA can"
        )


def _stream(
    runner: Runner,
    options: Options,
    processors: list[Processor],
    criteria: list[Criterion],
    generator: torch.Generator | None,
    streamer: Any,
) -> GenerateOutput:
    if streamer is None or not hasattr(streamer, "put"):
        if streamer is not None and not callable(streamer):
            raise ArgumentError(f"streamer must have put() and end(), or be callable; got {type(streamer).__name__}")
        return decode(runner, options, processors, criteria, generator=generator, on_tokens=streamer)
    streamer.put(runner.sequences.cpu())
    try:
        return decode(runner, options, processors, criteria, generator=generator, on_tokens=streamer.put)
    finally:
        streamer.end()  # also after an error: a thread may be waiting for the end


def _criteria(options: Options, tokenizer: Any, prompt_length: int) -> list[Criterion]:
    criteria: list[Criterion] = []
    if options.stop_strings:
        criteria.append(StopStrings(options.stop_strings, tokenizer, prompt_length))
    if options.max_time is not None:
        criteria.append(time_limit(options.max_time))
    return criteria


def _as_list(value: Iterable[Callable[..., Any]] | Callable[..., Any] | None, name: str) -> list[Callable[..., Any]]:
    """One callable or several. A list whose class is callable itself (as some libraries have) counts as a list."""
    if value is None:
        return []
    items = list(value) if isinstance(value, Iterable) else [value]
    for item in items:
        if not callable(item):
            raise ArgumentError(f"{name} must be callables (input_ids, scores), got {type(item).__name__}")
    return items
