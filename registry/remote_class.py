"""What a class of a repository's code must be before it is used, and how it is then loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..errors import ArgumentError, RemoteCodeError
from ..loading.code_files import CodeFiles
from ..models.causal_lm import CausalLM
from ..models.configuration import PreTrainedConfig
from ..models.custom_code import code_of
from .auto_map import CONFIG, MODEL, Reference
from .remote_package import give_files
from .table import Architecture


def checked_config(cls: type, reference: Reference, code: CodeFiles) -> Any:
    """The class, marked so that saving carries its code. Raises RemoteCodeError if it makes no configurations."""
    if not callable(getattr(cls, "from_dict", None)):
        raise RemoteCodeError(
            f"{reference.name} in {reference.file} of {code.place} is no configuration: it has no from_dict(values); "
            "derive it from loadstone.PreTrainedConfig"
        )
    _mark(cls, CONFIG)
    return cls


def checked_model(cls: type, reference: Reference, code: CodeFiles) -> Any:
    """The class, marked so that saving carries its code. Raises RemoteCodeError if it is no model, or a CausalLM
    without a configuration of its own."""
    what = f"{reference.name} in {reference.file} of {code.place}"
    if not issubclass(cls, nn.Module):
        raise RemoteCodeError(f"{what} is no model: it derives neither from loadstone.CausalLM nor from nn.Module")
    config_class = getattr(cls, "config_class", None)
    if issubclass(cls, CausalLM) and (
        not isinstance(config_class, type)
        or not issubclass(config_class, PreTrainedConfig)
        or config_class is PreTrainedConfig
    ):
        raise RemoteCodeError(
            f"{what} has config_class {config_class!r}; it must be a class derived from loadstone.PreTrainedConfig"
        )
    _mark(cls, MODEL)
    if isinstance(config_class, type):
        _mark(config_class, CONFIG)
    return cls


def _mark(cls: Any, auto_class: str) -> None:
    """Register the class for saving, if it is of a repository and knows how; a guest's saving copies its file."""
    code = code_of(cls)
    if code is None or getattr(cls, "_auto_class", None) is not None or not hasattr(cls, "register_for_auto_class"):
        return
    cls.register_for_auto_class(auto_class)
    if not issubclass(cls, (CausalLM, PreTrainedConfig)):
        give_files(code)


def made_config(cls: Any, values: dict[str, Any], **changes: Any) -> Any:
    """A configuration, or with ``return_unused_kwargs`` the pair (configuration, other arguments)."""
    if issubclass(cls, PreTrainedConfig):
        return cls.from_dict(values, **changes)
    from ..models.guest import guest_config

    both = changes.pop("return_unused_kwargs", False)
    name = changes.pop("name_or_path")
    config, others = guest_config(cls, values, changes)
    config.name_or_path = name
    return (config, others) if both else config


def loader_of(row: Architecture) -> Callable[..., Any]:
    """``from_pretrained`` of the row's model, or what stands for it if the class is not loadstone's."""
    cls = row.model_class()
    return cls.from_pretrained if issubclass(cls, CausalLM) else partial(_load_guest, cls, row)


def builder_of(row: Architecture) -> Callable[..., Any]:
    """``from_config`` of the row's model, or what stands for it."""
    cls = row.model_class()
    if issubclass(cls, CausalLM):
        return cls.from_config
    from ..models.guest import new_guest

    return partial(new_guest, cls)


def previewer_of(row: Architecture) -> Callable[..., Any]:
    """`preview` of the row's model, or what stands for it."""
    cls = row.model_class()
    if issubclass(cls, CausalLM):
        from ..models.preview import preview

        return partial(preview, cls)
    from ..models.guest import preview_guest

    return partial(preview_guest, cls, _config_class(cls, row))


def own_model_class(row: Architecture) -> Any:
    """The row's model for what needs a class of loadstone's. Raises RemoteCodeError for another."""
    cls = row.model_class()
    if not issubclass(cls, CausalLM):
        raise RemoteCodeError(
            f"{cls.__name__} of {row.origin} does not derive from loadstone.CausalLM, which this needs; "
            "AutoModelForCausalLM.from_pretrained loads it"
        )
    return cls


def _load_guest(cls: Any, row: Architecture, source: Any, *model_args: Any, **arguments: Any) -> Any:
    from ..models.guest import load_guest

    if model_args:
        raise ArgumentError(
            f"from_pretrained takes keyword arguments after the name, got {len(model_args)} more values"
        )
    for name in ("trust_remote_code", "code_revision"):
        arguments.pop(name, None)
    if arguments.pop("gguf_file", None) is not None:
        raise ArgumentError(f"gguf_file= needs a class of loadstone's, and {cls.__name__} is of {row.origin}")
    return load_guest(cls, _config_class(cls, row), source, **arguments)


def _config_class(cls: Any, row: Architecture) -> Any:
    """The configuration that a guest is built from: its own, else that which auto_map names beside it."""
    own = getattr(cls, "config_class", None)
    return own if callable(getattr(own, "from_dict", None)) else row.config_class()
