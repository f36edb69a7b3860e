"""The table of architectures: model_type → configuration class and model class.

Notable: built-in and plug-in classes are names until used, so the table costs nothing to import; a type that is not
in the table is looked for in the entry-point group ``loadstone.architectures`` before it is called unknown; a name
that is taken is an error unless ``exist_ok=True``, always.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import RegistrationError, UnsupportedModelError, nearest

if TYPE_CHECKING:
    from ..models.causal_lm import CausalLM
    from ..models.configuration import PreTrainedConfig

logger = logging.getLogger("loadstone.registry")
GROUP = "loadstone.architectures"
_ModelClass = TypeVar("_ModelClass", bound="type[CausalLM]")


@dataclass(frozen=True)
class Architecture:
    """One row: a model_type and its classes, each a class or "module:Class".

    ``model`` is None while only a configuration is registered. ``origin``: "loadstone", the distribution of a
    plug-in, or the module that registered it.
    """

    model_type: str
    config: type[PreTrainedConfig] | str
    model: type[CausalLM] | str | None
    origin: str

    def config_class(self) -> type[PreTrainedConfig]:
        """The configuration class, imported now if it was a name."""
        return _import(self.config) if isinstance(self.config, str) else self.config

    def model_class(self) -> type[CausalLM]:
        """The model class, imported now if it was a name. Raises UnsupportedModelError if there is none yet."""
        if self.model is None:
            raise UnsupportedModelError(
                f"{self.model_type!r} has a configuration but no model; "
                "AutoModelForCausalLM.register(config_class, model_class) adds one"
            )
        return _import(self.model) if isinstance(self.model, str) else self.model


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    package = __package__.rpartition(".")[0] if module.startswith(".") else None
    return getattr(import_module(module, package), attribute)


_BUILT_IN = {
    row.model_type: row
    for row in (
        Architecture("gpt2", ".models.gpt2:GPT2Config", ".models.gpt2:GPT2LMHeadModel", "loadstone"),
        Architecture("llama", ".models.llama:LlamaConfig", ".models.llama:LlamaForCausalLM", "loadstone"),
        Architecture("mistral", ".models.mistral:MistralConfig", ".models.mistral:MistralForCausalLM", "loadstone"),
    )
}
_table: dict[str, Architecture] = dict(_BUILT_IN)
_plugins_read = False
_lock = threading.RLock()
_closed = threading.local()


@contextmanager
def closed_to_this_thread() -> Iterator[None]:
    """While a repository's code runs: it serves its own checkpoint, and may not change what serves others."""
    before = getattr(_closed, "depth", 0)
    _closed.depth = before + 1
    try:
        yield
    finally:
        _closed.depth = before


def _left_out(model_type: str) -> bool:
    if not getattr(_closed, "depth", 0):
        return False
    logger.info("A repository's code registers %r: left out, its auto_map says what it serves", model_type)
    return True


def register(
    model_type: str, config: type[PreTrainedConfig], model: type[CausalLM] | None = None, exist_ok: bool = False
) -> None:
    """Make ``model_type`` known to AutoConfig and AutoModelForCausalLM.

    config: a PreTrainedConfig with this model_type. model: a CausalLM whose ``config_class`` is that configuration.
    Raises RegistrationError if the classes do not fit, or the type is taken and ``exist_ok`` is false.
    """
    _check(model_type, config, model)
    if _left_out(model_type):
        return
    origin = (model or config).__module__
    with _lock:
        taken = _table.get(model_type)
        if taken is not None and not exist_ok:
            raise RegistrationError(
                f"model_type {model_type!r} is already registered (by {taken.origin}); "
                "choose another name, or pass exist_ok=True to replace it"
            )
        _table[model_type] = Architecture(model_type, config, model, origin)


def register_causal_lm(model_type: str, *, exist_ok: bool = False) -> Callable[[_ModelClass], _ModelClass]:
    """Class decorator: register the model with its ``config_class`` under ``model_type``."""

    def decorate(model: _ModelClass) -> _ModelClass:
        register(model_type, model.config_class, model, exist_ok=exist_ok)
        return model

    return decorate


def register_model(config: type[PreTrainedConfig], model: type[CausalLM], exist_ok: bool = False) -> None:
    """Give a registered configuration its model; see `AutoModelForCausalLM.register`."""
    if not isinstance(config, type):
        raise RegistrationError(f"register takes classes, got {config!r}")
    model_type = getattr(config, "model_type", "")
    _check(model_type, config, model)
    if _left_out(model_type):
        return
    with _lock:
        row = _table.get(model_type)
        if row is None or row.config_class() is not config:
            if row is not None and not exist_ok:
                raise RegistrationError(
                    f"model_type {model_type!r} belongs to {row.config_class().__name__} (by {row.origin}), not to "
                    f"{config.__name__}; choose another model_type, or pass exist_ok=True to replace it"
                )
            row = Architecture(model_type, config, None, config.__module__)
        if row.model is not None and not exist_ok:
            raise RegistrationError(
                f"{config.__name__} already has a model (by {row.origin}); pass exist_ok=True to replace it"
            )
        _table[model_type] = replace(row, model=model, origin=model.__module__)


def _check(model_type: str, config: Any, model: Any) -> None:
    from ..models.causal_lm import CausalLM
    from ..models.configuration import PreTrainedConfig

    if not isinstance(model_type, str) or not model_type:
        raise RegistrationError(f"model_type must be a non-empty string, got {model_type!r}")
    if not (isinstance(config, type) and issubclass(config, PreTrainedConfig)):
        raise RegistrationError(f"{config!r} is not a PreTrainedConfig class; derive your configuration from it")
    if config.model_type != model_type:
        raise RegistrationError(
            f"{config.__name__}.model_type is {config.model_type!r} and it was to be registered as {model_type!r}; "
            "make them equal, for config.json holds the former"
        )
    if model is None:
        return
    if not (isinstance(model, type) and issubclass(model, CausalLM)):
        raise RegistrationError(f"{model!r} is not a CausalLM class; derive your model from it")
    if model.config_class is not config:
        raise RegistrationError(
            f"{model.__name__}.config_class is {model.config_class.__name__}, not {config.__name__}; set it"
        )


def lookup(model_type: str) -> Architecture:
    """The row of a model_type. Raises UnsupportedModelError with the nearest name and what to do."""
    if not isinstance(model_type, str):
        raise UnsupportedModelError(f"model_type must be a string, got {model_type!r}")
    with _lock:
        if model_type not in _table:
            _read_plugins()
        row = _table.get(model_type)
        known = sorted(_table)
    if row is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not registered{nearest(model_type, known) or ';'} "
            f"registered: {', '.join(known)}; "
            "loadstone.register(model_type, config_class, model_class) adds an architecture, as does a package with "
            f"an entry point in {GROUP!r}"
        )
    return row


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The row that serves a configuration object: by its class, or a class it derives from.

    Raises UnsupportedModelError if there is none.
    """
    with _lock:
        rows = list(_table.values())
    for candidate in type(config).__mro__:
        if getattr(candidate, "model_type", None) != config.model_type:
            break  # the parents of a type of its own are another architecture
        for row in rows:
            same = (
                row.config is candidate
                if not isinstance(row.config, str)
                else (candidate.__qualname__ == row.config.rpartition(":")[2] and row.config_class() is candidate)
            )
            if same:
                return row
    return lookup(config.model_type)


def _read_plugins() -> None:
    """Add the rows of installed entry points; each is the model class, named and not imported."""
    global _plugins_read
    if _plugins_read:
        return
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        if point.name not in _table:
            origin = point.dist.name if point.dist is not None else point.module
            _table[point.name] = _Plugin(point.name, point.value, point.value, origin)
    _plugins_read = True


class _Plugin(Architecture):
    """An entry point ``model_type = "package.module:ModelClass"``; its configuration is the model's config_class."""

    def model_class(self) -> type[CausalLM]:
        """The model class, imported and checked now. Raises RegistrationError if it does not fit its name."""
        try:
            model = super().model_class()
        except (ImportError, AttributeError) as error:
            raise RegistrationError(
                f"the plug-in of {self.origin} for {self.model_type!r} names {self.model}, which cannot be "
                f"imported: {error}"
            ) from error
        _check(self.model_type, getattr(model, "config_class", None), model)
        return model

    def config_class(self) -> type[PreTrainedConfig]:
        """The configuration class of the model."""
        return self.model_class().config_class


def list_architectures(pattern: str = "*") -> list[Architecture]:
    """Rows whose model_type matches a shell pattern ("qwen*"), by name, plug-ins included but not imported."""
    with _lock:
        _read_plugins()
        return [_table[name] for name in sorted(_table) if fnmatchcase(name, pattern)]


def unregister(model_type: str) -> None:
    """Take a row out again; a built-in one comes back as it was shipped."""
    with _lock:
        _table.pop(model_type, None)
        if model_type in _BUILT_IN:
            _table[model_type] = _BUILT_IN[model_type]
