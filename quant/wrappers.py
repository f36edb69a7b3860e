"""Writing to a packed weight as if it were a plain one, for layers that wrap a packed one and merge something into it.

Our own LoRA does so (`decoded`, `Codes`), and so do wrappers of other libraries, PEFT's above all: they hold the layer
as ``base_layer`` and add to ``base_layer.weight.data``. On codes that would be nonsense, for int8 a silent one. So a
wrapper that takes a packed layer gets its ``merge`` and ``unmerge`` run while the layer shows the decoded weight. No
such library is imported: the wrapper is known by its attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import QuantizationError

if TYPE_CHECKING:
    from .packed import PackedLinear

_FROM_ZERO = ("gaussian", "eva", "orthogonal", "lora_ga")  # initialisations that leave the base weight alone
_NEED_THE_MATRIX = ("use_dora", "kasa_config")


class Params4bit(nn.Parameter):
    """Codes whose bytes are held as floating-point numbers (``bnb_4bit_quant_storage``).

    Who casts every floating-point parameter of a model, as PEFT's prepare_model_for_kbit_training does, passes over
    parameters of a class of this name.
    """


def mark_codes(layer: PackedLinear) -> None:
    """Make a floating-point parameter that holds the layer's codes a `Params4bit`."""
    weight = layer._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.is_floating_point():
        layer._parameters["weight"] = Params4bit(weight.detach(), requires_grad=False)


class Codes:
    """The tensors that hold a packed layer's weight, to put back later."""

    def __init__(self, layer: PackedLinear) -> None:
        self._parts = layer.parts()

    def restore(self, layer: PackedLinear) -> None:
        """Give the layer the weight it had, bit for bit, where the layer is now."""
        device = layer.weight.device
        layer.fill({n: part if n in layer.stay_on_cpu else part.to(device) for n, part in self._parts.items()})


@contextmanager
def decoded(layer: PackedLinear) -> Iterator[nn.Parameter]:
    """Within, ``layer.weight`` is the decoded weight, (out_features, in_features) in fp32; afterwards it is encoded.

    The new codes are those of the weight in the dtype which was quantized before. If the body raises, the layer keeps
    its codes. Raises QuantizationError if the method cannot encode, before the body runs.
    """
    recipe = layer.load_recipe("weight")
    if recipe is None:
        raise QuantizationError(
            f"{type(layer).__name__} cannot be written to: its codes are only read, never made here. Keep the adapter "
            "beside the weights, or dequantize() the model first"
        )
    codes = layer._parameters["weight"]
    try:
        matrix = nn.Parameter(layer.dequantized_weight(torch.float32).detach().clone(), requires_grad=False)
        layer._parameters["weight"] = matrix
        yield matrix
        new = layer._parameters["weight"]
        assert new is not None
        source = new.detach().t() if layer.transposed else new.detach()
        parts = recipe.run(source.to(recipe.dtype).contiguous())
    finally:
        layer._parameters["weight"] = codes
    layer.fill(parts)


class _WritesDecoded:
    """What `watch_wrappers` puts before the class of a foreign wrapper of a packed layer."""

    merged_adapters: list[str]
    base_layer: Any

    def merge(self, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self.base_layer, "load_recipe"):
            super().merge(*args, **kwargs)  # type: ignore[misc]
            return
        before = self.__dict__.get("_codes_before_merge") or Codes(self.base_layer)
        with decoded(self.base_layer):
            super().merge(*args, **kwargs)  # type: ignore[misc]
        if self.merged_adapters:
            self.__dict__["_codes_before_merge"] = before

    def unmerge(self) -> None:
        before = self.__dict__.pop("_codes_before_merge", None)
        if before is None or not hasattr(self.base_layer, "load_recipe"):  # nothing merged, or dequantized since
            super().unmerge()  # type: ignore[misc]
            return
        with decoded(self.base_layer):
            super().unmerge()  # type: ignore[misc]
        before.restore(self.base_layer)  # what was subtracted again has been rounded twice; this has not

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config")
        needs = [name for name in _NEED_THE_MATRIX if getattr(config, name, None)]
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start not in _FROM_ZERO:
            needs.append(f"init_lora_weights={start!r}")
        if needs:
            raise QuantizationError(
                f"{needs[0]} works on the matrix itself, which a {type(self.base_layer).__name__} holds as codes; "
                "leave it out, or load the model without quantization"
            )
        super().update_layer(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__bases__[1],), self.__dict__


@cache
def _over(wrapper: Any) -> type:
    names = {"__module__": wrapper.__module__, "__doc__": wrapper.__doc__, "__qualname__": wrapper.__qualname__}
    return type(wrapper.__name__, (_WritesDecoded, wrapper), names)


def _blank(wrapper: type) -> Any:
    """An instance without state, for copy and pickle."""
    made: Any = _over(wrapper)
    return made.__new__(made)


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if name != "base_layer" or isinstance(module, _WritesDecoded):
        return
    from .packed import PackedLinear

    merges: Callable[..., Any] | None = getattr(type(module), "unmerge", None)
    if isinstance(submodule, PackedLinear) and callable(merges) and hasattr(type(module), "update_layer"):
        wrapper: Any = type(module)
        module.__class__ = _over(wrapper)


@cache
def watch_wrappers() -> None:
    """From now on notice wrappers of packed layers; called when the first packed layer is made."""
    register_module_module_registration_hook(_on_registration)
