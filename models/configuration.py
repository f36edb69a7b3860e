"""Configurations: typed data that round-trips a Hub config.json.

Notable: fields are checked when set, by type and range; unknown fields of a file are kept and written back; older
spellings (torch_dtype, rope_scaling) are read and the current ones written; nothing in a file can name code.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from typing_extensions import dataclass_transform

from ..errors import ConfigError, WriteError
from ..kernels import attention_names, attention_unavailable
from ..loading.strict_json import read_json_file
from .fields import check_value, dtype_name, parse_dtype, ranged

logger = logging.getLogger("loadstone.models")
_Config = TypeVar("_Config", bound="PreTrainedConfig")

_MOST_BYTES = 4 << 20

# Read from a file these would choose code, trust or a place to load from: only a caller may set them.
_NEVER_FROM_FILE = ("trust_remote_code", "name_or_path", "use_kernels", "kernel_config")


@dataclass_transform(kw_only_default=True, field_specifiers=(ranged, dataclasses.field))
class PreTrainedConfig:
    """Base of all configurations; subclasses declare annotated fields with defaults.

    ``model_type``: the string under which the architecture is registered. ``attribute_map``: other names under which
    a field can be read and set (``{"hidden_size": "n_embd"}``).
    Raises ConfigError for a value of the wrong type or range.
    """

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    _auto_class: ClassVar[str | None] = None

    architectures: list[str] | None = None
    dtype: torch.dtype | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(init=False, repr=False, eq=False)(cls)

    def __init__(self, **kwargs: Any) -> None:
        state = self.__dict__
        state["_name_or_path"] = str(kwargs.pop("name_or_path", ""))
        attn = kwargs.pop("attn_implementation", None)
        values = self._current_spelling(kwargs)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.name in values:
                setattr(self, field.name, values.pop(field.name))
            elif field.name not in state:
                state[field.name] = (
                    field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
                )
        for name, value in values.items():
            self._keep_unknown(name, value)
        state["_attn_implementation"] = attn
        self.__post_init__()
        self.validate()

    def _keep_unknown(self, name: str, value: Any) -> None:
        """Hold a field of a file that the class does not declare; it may not stand in for a method."""
        of_class = getattr(type(self), name, None)
        if isinstance(of_class, property):
            self.__dict__[name] = value  # written back, while reading gives what the property computes
        elif of_class is not None and not name.startswith("_"):
            raise ConfigError(f"{type(self).__name__} has an attribute {name!r} that is no field; rename the field")
        else:
            setattr(self, name, value)

    def __post_init__(self) -> None:
        """Fill in fields derived from others. Subclasses extend it."""

    def validate(self) -> None:
        """Raise ConfigError if fields contradict each other. Subclasses extend it."""

    @classmethod
    def _current_spelling(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Today's field names for a file's or a caller's: torch_dtype → dtype, attribute_map applied."""
        current = {cls.attribute_map.get(name, name): value for name, value in values.items()}
        current.pop("model_type", None)
        if "torch_dtype" in current:
            old = current.pop("torch_dtype")
            if current.get("dtype") is None:
                current["dtype"] = old
        if current.get("dtype") is not None:
            current["dtype"] = parse_dtype(current["dtype"], where=f"{cls.__name__}.dtype")
        return current

    @classmethod
    def _override(cls, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """``values``, in today's spelling, with a caller's changes, in any."""
        return {**values, **cls._current_spelling(changes)}

    @classmethod
    def _annotations(cls) -> dict[str, tuple[Any, Any]]:
        cached = cls.__dict__.get("_resolved_annotations")
        if cached is None:
            hints = get_type_hints(cls)
            cached = {f.name: (hints[f.name], f.metadata) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
            cls._resolved_annotations = cached  # type: ignore[attr-defined]
        return cached

    def __setattr__(self, name: str, value: Any) -> None:
        name = type(self).attribute_map.get(name, name)
        if name == "torch_dtype":
            name = "dtype"
        declared = self._annotations().get(name)
        if declared is not None:
            if name == "dtype" and value is not None:
                value = parse_dtype(value, where=f"{type(self).__name__}.dtype")
            value = check_value(type(self).__name__, name, value, *declared)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        target = type(self).attribute_map.get(name)
        if target is not None:
            return getattr(self, target)
        if name == "torch_dtype":
            return self.dtype
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def name_or_path(self) -> str:
        """What `from_pretrained` was given, or an empty string."""
        return self.__dict__["_name_or_path"]

    @name_or_path.setter
    def name_or_path(self, value: str) -> None:
        self.__dict__["_name_or_path"] = str(value)

    @property
    def use_return_dict(self) -> bool:
        """Whether forward returns an output object rather than a tuple."""
        return self.return_dict

    def get_text_config(self, **kwargs: Any) -> PreTrainedConfig:
        """The configuration of the text model: this one, as all models here are text models."""
        return self

    # Reading

    @classmethod
    def from_dict(
        cls: type[_Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build from a dictionary; keyword arguments that are attributes override it.

        Returns the configuration, with ``return_unused_kwargs`` the pair (configuration, the other arguments).
        """
        values = cls._current_spelling(config_dict)
        known = {name for name in kwargs if cls.has_field(name) or name in values or name == "attn_implementation"}
        values = cls._override(values, {name: kwargs[name] for name in known if name != "attn_implementation"})
        if "attn_implementation" in kwargs:
            values["attn_implementation"] = kwargs["attn_implementation"]
        config = cls(**values)
        unused = {name: value for name, value in kwargs.items() if name not in known}
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def has_field(cls, name: str) -> bool:
        """Whether ``name`` is a field of this configuration, under any of its spellings."""
        name = cls.attribute_map.get(name, name)
        return name in cls._annotations() or name in ("torch_dtype", "name_or_path")

    @classmethod
    def field_names(cls) -> list[str]:
        """All names under which fields can be set."""
        return [*cls._annotations(), *cls.attribute_map]

    @classmethod
    def get_config_dict(cls, name_or_path: Any, **kwargs: Any) -> dict[str, Any]:
        """The parsed config.json of a directory, a repository id or the file itself; see `from_pretrained`."""
        from ..loading.source import resolve_source

        if (gguf_file := kwargs.pop("gguf_file", None)) is not None:
            from .gguf import read_gguf_config

            return read_gguf_config(resolve_source(name_or_path, **kwargs), gguf_file, cls)
        if isinstance(name_or_path, (str, os.PathLike)) and os.path.isfile(name_or_path):
            return read_config_file(Path(name_or_path))
        return read_config_file(resolve_source(name_or_path, **kwargs).require("config.json"))

    @classmethod
    def from_pretrained(
        cls: type[_Config],
        pretrained_model_name_or_path: Any,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        proxies: Mapping[str, str | None] | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str = "",
        verify: str | bool | None = None,
        gguf_file: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read config.json from a directory, a Hub repository or a file; other arguments override its fields.

        gguf_file: a GGUF file there, whose metadata is read in place of config.json.

        Raises NotFoundError if there is none, ConfigError if it is malformed or of another ``model_type``.
        """
        from ..loading.source import Source

        hub: dict[str, Any] = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "proxies": proxies,
            "token": token,
            "revision": revision,
            "subfolder": subfolder,
            "verify": verify,
        }
        values = cls.get_config_dict(pretrained_model_name_or_path, **hub, gguf_file=gguf_file)
        given = values.get("model_type")
        if cls.model_type and given not in (None, cls.model_type):
            raise ConfigError(
                f"{pretrained_model_name_or_path} is a model of type {given!r}, {cls.__name__} is for "
                f"{cls.model_type!r}; use AutoConfig, or the class for {given!r}"
            )
        given_name = pretrained_model_name_or_path
        kwargs.setdefault("name_or_path", given_name.name if isinstance(given_name, Source) else str(given_name))
        return cls.from_dict(values, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # Writing

    def to_dict(self) -> dict[str, Any]:
        """Everything a config.json holds: fields, unknown fields that were read, and model_type; JSON values."""
        values = {name: copy.deepcopy(v) for name, v in self.__dict__.items() if not name.startswith("_")}
        if self.dtype is not None:
            values["dtype"] = dtype_name(self.dtype)
        quantization: Any = values.get("quantization_config")
        if callable(getattr(quantization, "to_dict", None)):
            values["quantization_config"] = quantization.to_dict()
        values["model_type"] = self.model_type
        return values

    def to_json_string(self) -> str:
        """`to_dict` as sorted, indented JSON. Raises ConfigError naming a value that JSON cannot hold."""
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{type(self).__name__} holds a value that config.json cannot: {error}") from error

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write config.json into the directory, made if need be; an old file stays until the new one is whole.

        The code of a class that is registered for an auto class goes with it.
        """
        from .custom_code import carried_code

        files, auto_map = carried_code(self)
        for name, content in files.items():
            write_config_file(save_directory, name, content)
        write_config_file(save_directory, "config.json", self.with_auto_map(auto_map).to_json_string())

    def with_auto_map(self: _Config, auto_map: dict[str, Any] | None) -> _Config:
        """This configuration, or a copy of it whose ``auto_map`` is another."""
        if self.__dict__.get("auto_map") == auto_map:
            return self
        changed = copy.deepcopy(self)
        changed.__dict__.pop("auto_map", None)
        if auto_map is not None:
            changed.__dict__["auto_map"] = auto_map
        return changed

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Mark the class so that saving carries its code along, for ``AutoConfig`` with trust_remote_code=True.

        Raises ArgumentError for another auto class.
        """
        from .custom_code import check_auto_class

        cls._auto_class = check_auto_class(cls, auto_class, "AutoConfig")

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set several attributes."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


dataclasses.dataclass(init=False, repr=False, eq=False)(PreTrainedConfig)


def read_config_file(path: Path, *, limit: int = _MOST_BYTES) -> dict[str, Any]:
    """Parse a config.json, dropping what only a caller may choose.

    Raises ConfigError naming the file if it is too large, not UTF-8, not JSON, not an object, nested deep, or holds a
    key twice or a number beyond those of floats; NotFoundError, PathError if it cannot be read.
    """
    values = read_json_file(path, limit=limit, error=ConfigError, what="a configuration")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(values).__name__}")
    attn = values.pop("attn_implementation", None)
    if attn is not None and attn not in attention_names():
        logger.warning("%s asks for attn_implementation=%r: ignored, only a caller can choose it", path, attn)
    elif attn is not None and (reason := attention_unavailable(attn)) is not None:
        logger.warning("%s asks for attn_implementation=%r: ignored, %s", path, attn, reason)
    elif attn is not None:
        values["attn_implementation"] = attn
    for name in [n for n in values if n.startswith("_") or n in _NEVER_FROM_FILE]:
        del values[name]
    return values


def write_config_file(directory: str | os.PathLike[str], name: str, text: str | bytes) -> None:
    """Write a text file (folders by '/') into a directory, made if need be; an old one stays until the new is whole.

    Raises ConfigError if the directory is a file, WriteError if the disk does not take it.
    """
    directory = Path(directory)
    if directory.is_file():
        raise ConfigError(f"{directory} is a file; save_pretrained needs a directory")
    place = directory / name
    staged = place.with_name(f".{place.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_bytes(text if isinstance(text, bytes) else text.encode())
            os.replace(staged, place)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError.of(error, f"{str(place)!r} is not written, what was there before still is") from error
