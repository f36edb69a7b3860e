"""From what the caller, the model and the defaults say to the options of one call."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

from ...errors import ArgumentError, GenerationError, nearest
from .configuration import GenerationConfig

logger = logging.getLogger("loadstone.generation")
_warned: set[str] = set()

_DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}

# Options of other libraries that change the result, with the values that do not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "assistant_model": (),
    "constraints": (),
    "custom_generate": (),
    "disable_compile": (True, False),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "guidance_scale": (1.0,),
    "low_memory": (False,),
    "max_cache_len": (),
    "negative_prompt_ids": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "prefix_allowed_tokens_fn": (),
    "prompt_lookup_num_tokens": (),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "synced_gpus": (False,),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "watermarking_config": (),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One call's options, all decided. Lengths count tokens of the returned sequences, prompt included."""

    max_length: int
    min_length: int
    max_time: float | None
    stop_strings: tuple[str, ...]
    do_sample: bool
    num_beams: int
    num_return_sequences: int
    early_stopping: bool | str
    length_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float | None
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    forced_eos: tuple[int, ...]
    renormalize_logits: bool
    eos: tuple[int, ...]
    pad: int | None
    use_cache: bool
    static_cache: bool
    prefill_chunk_size: int | None
    return_dict: bool
    output_scores: bool
    output_logits: bool
    output_attentions: bool
    output_hidden_states: bool


def warn_once(message: str) -> None:
    """Log a warning the first time it is given."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def merge(model_config: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All options by name: kwargs over the given configuration over the model's; None where nobody says anything.

    A None among the kwargs unsets what the configurations say. Raises ArgumentError, GenerationError.
    """
    known = GenerationConfig.field_names()
    for name, value in kwargs.items():
        if name in UNSUPPORTED:
            if value is not None and value not in UNSUPPORTED[name]:
                raise GenerationError(f"generate() cannot do {name}={value!r}; leave {name} out")
        elif name not in known:
            names = [*known, "input_ids", "attention_mask", "inputs_embeds", "generator", "streamer", "tokenizer"]
            raise ArgumentError(f"generate() got an unknown argument {name!r}{nearest(name, names)}")
    if kwargs.get("max_new_tokens") is not None and kwargs.get("max_length") is not None:
        logger.warning("generate() was given both max_new_tokens and max_length: max_new_tokens counts")
    overrides = GenerationConfig(**{name: value for name, value in kwargs.items() if name in known})
    merged: dict[str, Any] = {}
    for name in known:
        values = [getattr(config, name) for config in (given, model_config) if config is not None]
        first = next((value for value in values if value is not None), None)
        merged[name] = getattr(overrides, name) if name in kwargs else first
    for config in (given, model_config):
        for name, value in (config.extra if config is not None else {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                warn_once(f"the generation configuration sets {name}={value!r}, which generate() cannot do: ignored")
    return merged


def resolve(
    merged: dict[str, Any], *, prompt_length: int, embeds_length: int | None, max_positions: int | None
) -> Options:
    """Decide every option; ``prompt_length`` counts input_ids, ``embeds_length`` inputs_embeds (None without)."""
    chosen: dict[str, Any] = {name: _DEFAULTS.get(name) if value is None else value for name, value in merged.items()}
    chosen["max_length"], chosen["min_length"] = _lengths(merged, prompt_length, embeds_length, max_positions)
    eos, pad = _ids(merged["eos_token_id"]), merged["pad_token_id"]
    pad = None if pad is not None and pad < 0 else pad
    stop = chosen["stop_strings"]
    implementation = chosen["cache_implementation"]
    if implementation not in (
        None,
        "dynamic",
        "static",
        "hybrid",
    ):  # hybrid: an older name for what a model does anyway
        raise GenerationError(f"cache_implementation={implementation!r} is not known; use None, 'dynamic' or 'static'")
    names = Options.__dataclass_fields__
    options = Options(
        **{name: chosen[name] for name in names if name in chosen and name not in _DERIVED},
        stop_strings=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        bad_words_ids=tuple(tuple(words) for words in chosen["bad_words_ids"] or ()),
        suppress_tokens=_ids(chosen["suppress_tokens"]),
        begin_suppress_tokens=_ids(chosen["begin_suppress_tokens"]),
        forced_eos=_ids(chosen["forced_eos_token_id"]),
        eos=eos,
        pad=eos[0] if pad is None and eos else pad,
        # Only the first step sees the embeddings, so the cache has to remember them.
        use_cache=chosen["use_cache"] or embeds_length is not None,
        static_cache=implementation == "static",
        return_dict=chosen["return_dict_in_generate"],
    )
    _check(options)
    return options


_DERIVED = {"stop_strings", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "use_cache"}


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _lengths(
    merged: dict[str, Any], prompt_length: int, embeds_length: int | None, max_positions: int | None
) -> tuple[int, int]:
    """(longest, shortest) sequence, prompt included."""
    longest, new = merged["max_length"], merged["max_new_tokens"]
    # Embeddings in place of input_ids: the caller's lengths count them, the returned sequences do not.
    hidden = embeds_length if embeds_length is not None and embeds_length != prompt_length else 0
    if new is not None:
        longest = prompt_length + new
    elif longest is None:
        longest = prompt_length + _DEFAULTS["max_length"]
        warnings.warn(
            f"neither max_new_tokens nor max_length is set: generating up to {_DEFAULTS['max_length']} new tokens;"
            " pass max_new_tokens to choose",
            UserWarning,
            stacklevel=4,
        )
        if max_positions is not None:
            longest = min(longest, max_positions)
    else:
        longest -= hidden
    if prompt_length >= longest:
        raise GenerationError(
            f"the prompt has {prompt_length + hidden} tokens and at most {longest + hidden} are allowed in all;"
            " raise max_length, or pass max_new_tokens instead"
        )
    if merged["min_new_tokens"] is not None:
        shortest = prompt_length + merged["min_new_tokens"]
    else:
        shortest = max((merged["min_length"] or 0) - hidden, 0)
    if shortest > longest:
        warnings.warn(
            f"the shortest length asked for ({shortest}) is beyond the longest ({longest}): stopping at the longest",
            UserWarning,
            stacklevel=4,
        )
    return longest, shortest


def _check(options: Options) -> None:
    """Raise GenerationError for options that contradict each other."""
    if options.do_sample and options.temperature == 0:
        raise GenerationError("temperature=0 leaves nothing to sample; pass do_sample=False for greedy decoding")
    if options.num_beams == 1 and options.num_return_sequences > 1 and not options.do_sample:
        raise GenerationError(
            f"greedy decoding has one result, num_return_sequences={options.num_return_sequences} was asked for;"
            " pass do_sample=True or num_beams"
        )
    if options.num_beams > 1 and options.num_return_sequences > options.num_beams:
        raise GenerationError(
            f"num_return_sequences={options.num_return_sequences} is more than num_beams={options.num_beams}"
        )
    if any(not text for text in options.stop_strings):
        raise GenerationError("stop_strings holds an empty string")
    if any(not words for words in options.bad_words_ids):
        raise GenerationError("bad_words_ids holds an empty list")
    if options.static_cache and not options.use_cache:
        raise GenerationError("cache_implementation='static' and use_cache=False contradict each other")
    if not options.do_sample and options.temperature != 1.0:
        warn_once(f"temperature={options.temperature} has no effect without do_sample=True")
