"""Quantization methods by ``quant_method``, and which one serves a checkpoint and its caller."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from ..errors import QuantizationError, RegistrationError, nearest

logger = logging.getLogger("loadstone.quant")


class _Method(NamedTuple):
    """Classes, or where to import them from when first used: ``"module:name"`` in this package."""

    config: Any
    quantizer: Any

    def classes(self) -> tuple[Any, Any]:
        """(class of configurations, what makes a quantizer of one)."""
        return _resolve(self.config), _resolve(self.quantizer)


_LOCK = threading.Lock()
_METHODS: dict[str, _Method] = {
    "awq": _Method("awq:AwqConfig", "awq:AwqQuantizer"),
    "bitsandbytes": _Method("config:BitsAndBytesConfig", "bitsandbytes:bitsandbytes_quantizer"),
    "gptq": _Method("gptq:GPTQConfig", "gptq:GPTQQuantizer"),
    "weight_only": _Method("weight_only:WeightOnlyConfig", "weight_only:WeightOnlyQuantizer"),
}
_BITS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")


def _resolve(what: Any) -> Any:
    if not isinstance(what, str):
        return what
    module, _, name = what.partition(":")
    return getattr(import_module(f".{module}", __package__), name)


def register_quantizer(
    name: str, config: type[Any], quantizer: Callable[[Any, bool], Any], exist_ok: bool = False
) -> None:
    """Make a quantization method known.

    name: what a config.json's ``quantization_config`` says as ``quant_method``.
    config: class of the method's configurations, with ``quant_method == name``, ``from_dict`` and ``to_dict``; see
        `loadstone.quant.quantizer.QuantizationConfig`.
    quantizer: ``quantizer(config, pre_quantized)`` → a `loadstone.quant.quantizer.Quantizer`; a class, or a function
        that picks one.
    exist_ok: replace a method of that name.
    Raises RegistrationError if the name is taken or the pieces do not fit.
    """
    if not isinstance(name, str) or not name:
        raise RegistrationError(f"the name of a quantization method is a text, not {name!r}")
    if not callable(getattr(config, "from_dict", None)) or not callable(getattr(config, "to_dict", None)):
        raise RegistrationError(f"the configuration of {name!r} needs from_dict and to_dict, {config!r} has not both")
    given = _name_of(getattr(config, "quant_method", None))
    if given != name:
        raise RegistrationError(
            f"{config!r} says quant_method={given!r}, it is registered as {name!r}; make them equal"
        )
    if not callable(quantizer):
        raise RegistrationError(f"the quantizer of {name!r} must be called with (config, pre_quantized): {quantizer!r}")
    with _LOCK:
        if name in _METHODS and not exist_ok:
            raise RegistrationError(f"a quantization method {name!r} is registered; pass exist_ok=True to replace it")
        _METHODS[name] = _Method(config, quantizer)


def quantization_methods() -> list[str]:
    """The names of all registered methods."""
    return sorted(_METHODS)


def find_quantizer(name: str, of_checkpoint: Any, of_caller: Any) -> Any:
    """The quantizer that checkpoint ``name`` needs or its caller asks for, None for neither.

    of_checkpoint, of_caller: a JSON object, a configuration, or None. If both are given the checkpoint's counts, with
    a warning where they differ. Raises QuantizationError if they are of two methods, of an unknown one or of none, and
    for a checkpoint to quantize with a method that only reads packed ones.
    """
    theirs = None if of_checkpoint is None else parse_config(of_checkpoint, f"{name}'s quantization_config")
    ours = None if of_caller is None else parse_config(of_caller, "quantization_config")
    if theirs is not None and ours is not None:
        if type(theirs) is not type(ours):
            raise QuantizationError(
                f"{name} is quantized with {_method_of(theirs)!r}, quantization_config asks for {_method_of(ours)!r}; "
                "leave quantization_config out, or load the full-precision checkpoint it was made from"
            )
        if theirs.to_dict() != ours.to_dict():
            logger.warning("%s is quantized already: its own quantization_config is used, not the one given", name)
    chosen = ours if theirs is None else theirs
    if chosen is None:
        return None
    _, make = _METHODS[_method_of(chosen)].classes()
    quantizer = make(chosen, theirs is not None)
    if theirs is None and not quantizer.can_quantize:
        raise QuantizationError(
            f"{_method_of(chosen)!r} only reads checkpoints that were quantized with it, and {name} was not"
        )
    return quantizer


def parse_config(given: Any, where: str) -> Any:
    """A method's configuration object from itself or its JSON object; ``where`` is for messages."""
    if isinstance(given, Mapping):
        method = given.get("quant_method")
        if method is None and any(given.get(flag) for flag in _BITS):
            method = "bitsandbytes"
        if method is None:
            raise QuantizationError(f"{where} names no quant_method: {dict(given)!r}")
        return _known(method, where).classes()[0].from_dict(given)
    method = getattr(given, "quant_method", None)
    if method is None or not callable(getattr(given, "to_dict", None)):
        raise QuantizationError(
            f"{where} must be a configuration such as BitsAndBytesConfig(load_in_4bit=True), or a dictionary; got "
            f"{type(given).__name__} {given!r}"
        )
    config = _known(method, where).classes()[0]
    return given if isinstance(given, config) else config.from_dict(given.to_dict())


def _known(method: Any, where: str) -> _Method:
    name = _name_of(method)
    if not isinstance(name, str) or name not in _METHODS:
        hint = nearest(name, _METHODS) if isinstance(name, str) else ""
        raise QuantizationError(
            f"{where} asks for quant_method {name!r}, which is not known{hint}; known: "
            f"{', '.join(quantization_methods())}. register_quantizer adds one; else load the full-precision checkpoint"
        )
    return _METHODS[name]


def _method_of(config: Any) -> str:
    return str(_name_of(config.quant_method))


def _name_of(method: Any) -> Any:
    """Other libraries' enumerations say their name as ``value``."""
    return getattr(method, "value", method)
