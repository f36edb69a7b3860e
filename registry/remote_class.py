"""What a class of a repository's code must be, before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RemoteCodeError
from ..loading.code_files import CodeFiles
from ..models.custom_code import code_of
from .auto_map import CONFIG, MODEL, Reference

if TYPE_CHECKING:
    from ..models.causal_lm import CausalLM
    from ..models.configuration import PreTrainedConfig


def checked_config(cls: type, reference: Reference, code: CodeFiles) -> type[PreTrainedConfig]:
    """The class, marked so that saving carries its code. Raises RemoteCodeError if it is no PreTrainedConfig."""
    from ..models.configuration import PreTrainedConfig

    if not issubclass(cls, PreTrainedConfig):
        raise _foreign(cls, reference, code, "PreTrainedConfig")
    if code_of(cls) is not None and cls._auto_class is None:
        cls.register_for_auto_class(CONFIG)
    return cls


def checked_model(cls: type, reference: Reference, code: CodeFiles) -> type[CausalLM]:
    """The class, marked so that saving carries its code. Raises RemoteCodeError if it is no CausalLM with a
    configuration of its own."""
    from ..models.causal_lm import CausalLM
    from ..models.configuration import PreTrainedConfig

    if not issubclass(cls, CausalLM):
        raise _foreign(cls, reference, code, "CausalLM")
    config_class = getattr(cls, "config_class", None)
    if not (isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)) or (
        config_class is PreTrainedConfig
    ):
        raise RemoteCodeError(
            f"{reference.name} in {reference.file} of {code.place} has config_class {config_class!r}; it must be a "
            "class derived from loadstone.PreTrainedConfig"
        )
    if code_of(cls) is not None and cls._auto_class is None:
        cls.register_for_auto_class(MODEL)
    if code_of(config_class) is not None and config_class._auto_class is None:
        config_class.register_for_auto_class(CONFIG)
    return cls


def _foreign(cls: type, reference: Reference, code: CodeFiles, base: str) -> RemoteCodeError:
    roots = {kind.__module__.partition(".")[0] for kind in cls.__mro__}
    what = f"{reference.name} in {reference.file} of {code.place}"
    if "transformers" in roots:
        return RemoteCodeError(
            f"{what} is written for transformers: it derives from a class of transformers, not from loadstone.{base}; "
            "load it with transformers' auto classes, or derive it from loadstone's (docs/remote_code.md shows what a "
            "class has to have)"
        )
    return RemoteCodeError(f"{what} does not derive from loadstone.{base}, which loading, saving and generating need")
