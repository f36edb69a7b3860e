"""Generation options as data: checked when set, read from and written to generation_config.json."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from ...errors import ArgumentError, ConfigError, GenerationError, nearest
from ..configuration import read_config_file, write_config_file
from ..fields import check_value, ranged

FILE_NAME = "generation_config.json"
_Config = TypeVar("_Config", bound="GenerationConfig")


@dataclasses.dataclass(eq=True, kw_only=True, repr=False)
class GenerationConfig:
    """What `generate` does. None means unset: the model's own options, then the defaults, fill it in.

    max_length counts the prompt, max_new_tokens (which wins) does not; min_length and min_new_tokens likewise.
    top_k=0 and top_p=1.0 switch those filters off; without a value top_k is 50 when sampling. early_stopping is True,
    False or "never". eos_token_id: one id or several. cache_implementation: None, "dynamic" or "static".
    extra: fields of a file that are not known here; kept and written back. Raises GenerationError for a value of the
    wrong type or range, ArgumentError for an unknown name.
    """

    max_length: int | None = ranged(None, minimum=1)
    max_new_tokens: int | None = ranged(None, minimum=1)
    min_length: int | None = ranged(None, minimum=0)
    min_new_tokens: int | None = ranged(None, minimum=0)
    max_time: float | None = ranged(None, above=0)
    stop_strings: str | list[str] | None = None

    do_sample: bool | None = None
    num_beams: int | None = ranged(None, minimum=1, maximum=1 << 12)
    num_return_sequences: int | None = ranged(None, minimum=1, maximum=1 << 16)
    early_stopping: bool | str | None = None
    length_penalty: float | None = None

    temperature: float | None = ranged(None, minimum=0)
    top_k: int | None = ranged(None, minimum=0)
    top_p: float | None = ranged(None, minimum=0, maximum=1)
    min_p: float | None = ranged(None, minimum=0, maximum=1)
    typical_p: float | None = ranged(None, above=0, maximum=1)
    repetition_penalty: float | None = ranged(None, above=0)
    no_repeat_ngram_size: int | None = ranged(None, minimum=0)
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    forced_eos_token_id: int | list[int] | None = None
    renormalize_logits: bool | None = None

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    use_cache: bool | None = None
    cache_implementation: str | None = None
    prefill_chunk_size: int | None = ranged(None, minimum=1)

    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None

    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "extra":
            if isinstance(value, torch.Tensor):
                value = value.tolist()
            value = _checked(type(self), name, value)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str)}"

    @classmethod
    def field_names(cls) -> list[str]:
        """The options known here."""
        return [field.name for field in dataclasses.fields(cls) if field.name != "extra"]

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any], **overrides: Any) -> _Config:
        """Build from a mapping; unknown names go to ``extra``, unknown overrides are an ArgumentError."""
        known = cls.field_names()
        for name in overrides:
            if name not in known:
                raise ArgumentError(f"{cls.__name__} has no option {name!r}{nearest(name, known)}")
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**{name: value for name, value in values.items() if name in known} | overrides, extra=extra)

    @classmethod
    def of(cls: type[_Config], given: Any) -> _Config | None:
        """What a caller means: a configuration of this class or None as it is, transformers' one by what it sets.

        Raises ArgumentError for anything else, a model's configuration among it; GenerationError for options out of
        range.
        """
        if given is None or isinstance(given, cls):
            return given
        told = getattr(given, "to_diff_dict", None) or getattr(given, "to_dict", None)
        if isinstance(given, Mapping) or hasattr(type(given), "model_type") or not callable(told):
            raise ArgumentError(
                f"generation_config must be a GenerationConfig, got {type(given).__name__}; pass options by keyword"
            )
        return cls.from_dict({name: value for name, value in told().items() if not name.startswith("_")})

    @classmethod
    def from_pretrained(cls: type[_Config], source: Any, *, file_name: str = FILE_NAME, **kwargs: Any) -> _Config:
        """Read generation_config.json of a directory, a Hub repository or a Source; options in kwargs override it.

        Other keywords (revision, cache_dir, token, ...) choose the place, as for models. Raises NotFoundError if there
        is no such file, ConfigError if it is not valid.
        """
        from ...loading.source import resolve_source

        known = cls.field_names()
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        if not hasattr(source, "require"):
            source = resolve_source(source, **kwargs)
        return cls.from_file(source.require(file_name), **overrides)

    @classmethod
    def from_file(cls: type[_Config], path: Path, **overrides: Any) -> _Config:
        """Read one JSON file. Raises ConfigError naming it if it is not valid."""
        values = read_config_file(path)
        try:
            config = cls.from_dict(values)
        except GenerationError as error:
            raise ConfigError(f"{path}: {error}") from error
        for name, value in overrides.items():
            setattr(config, name, value)
        return config

    @classmethod
    def from_source(cls: type[_Config], source: Any, model_config: Any) -> _Config:
        """What a model loaded from this Source generates with: its generation_config.json, else its config's tokens."""
        path = source.find(FILE_NAME)
        return cls.from_model_config(model_config) if path is None else cls.from_file(path)

    @classmethod
    def from_model_config(cls: type[_Config], config: Any) -> _Config:
        """The special tokens of a model's configuration, and options that older files keep there.

        Such an option counts only if it is an unknown attribute of the configuration that has a valid value.
        """
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        skip = {"use_cache", "output_attentions", "output_hidden_states"}
        result = cls()
        for name in cls.field_names():
            if name not in skip and values.get(name) is not None:
                try:
                    setattr(result, name, values[name])
                except GenerationError:
                    if name.endswith("_token_id"):
                        raise
        return result

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the options among kwargs; returns the others."""
        known = self.field_names()
        for name, value in kwargs.items():
            if name in known:
                setattr(self, name, value)
        return {name: value for name, value in kwargs.items() if name not in known}

    def to_dict(self) -> dict[str, Any]:
        """Options that are set, and unknown fields that were read."""
        values = {name: getattr(self, name) for name in self.field_names()}
        return {**self.extra, **{name: value for name, value in values.items() if value is not None}}

    def to_json_string(self) -> str:
        """The content of a generation_config.json. Raises ConfigError for a value that JSON cannot hold."""
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{type(self).__name__} holds a value that {FILE_NAME} cannot: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write generation_config.json; the old file stays until the new one is whole."""
        write_config_file(save_directory, FILE_NAME, self.to_json_string())


_annotations: dict[type, dict[str, tuple[Any, Any]]] = {}


def _checked(cls: type[GenerationConfig], name: str, value: Any) -> Any:
    """The value if the option may have it. Raises ArgumentError or GenerationError."""
    if cls not in _annotations:
        hints = get_type_hints(cls)
        _annotations[cls] = {f.name: (hints[f.name], f.metadata) for f in dataclasses.fields(cls)}
    if name not in _annotations[cls]:
        raise ArgumentError(f"{cls.__name__} has no option {name!r}{nearest(name, cls.field_names())}")
    try:
        value = check_value(cls.__name__, name, value, *_annotations[cls][name])
    except ConfigError as error:
        raise GenerationError(str(error)) from None
    if name == "early_stopping" and isinstance(value, str) and value != "never":
        raise GenerationError(f"{cls.__name__}.early_stopping must be True, False or 'never', got {value!r}")
    return value
