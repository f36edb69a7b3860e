"""`Quantizer`: what a quantization method is to the rest of loadstone. See `register_quantizer`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from ..errors import QuantizationError
from .packed import PackedLinear
from .replace import dequantize_linears, replace_linears


@runtime_checkable
class QuantizationConfig(Protocol):
    """The configuration of a method, which a caller passes and a config.json holds as ``quantization_config``.

    ``quant_method``: the name under which the method is registered. ``from_dict`` is a class method and raises
    QuantizationError for values that are wrong; ``to_dict`` gives JSON values that ``from_dict`` takes back. An
    attribute ``modules_to_not_convert``, where there is one, lists modules to leave as they are (None: the default).
    """

    quant_method: Any

    @classmethod
    def from_dict(cls, config_dict: Any) -> Any:
        """The configuration of a JSON object."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a JSON object."""


class Quantizer(ABC):
    """One method at work on one model. A subclass writes `convert` and says what it can do.

    config: what the caller gave or the checkpoint holds. pre_quantized: whether the checkpoint is packed already.

    The way of a load: ``Quantizer(config, pre_quantized)`` → `replace` puts packed layers (`PackedLinear`) into the
    model while it is on meta, so that plans, reports and device maps count packed bytes → each tensor is mapped or
    copied into its place if the checkpoint is packed, after `PackedLinear.check_parts`; else made by the layer's
    `Recipe`, one tensor at a time, on its device → `check` → the model is the caller's.
    """

    can_quantize: ClassVar[bool] = True
    """Whether floating-point checkpoints can be quantized while loading; if not, only packed ones are read."""
    bits: ClassVar[int | None] = None
    """4 or 8 sets ``model.is_loaded_in_4bit`` or ``is_loaded_in_8bit``."""
    is_trainable: ClassVar[bool] = True
    """Whether gradients pass through packed layers to adapters and to what comes before: transformers' Trainer asks."""
    is_qat_trainable: ClassVar[bool] = False
    """Whether the codes themselves are trained, as it asks too."""

    def __init__(self, config: Any, pre_quantized: bool = False) -> None:
        self.config = config
        self.pre_quantized = pre_quantized

    @property
    def quantization_config(self) -> Any:
        """The configuration, by the name under which other libraries look for it."""
        return self.config

    @abstractmethod
    def convert(self, name: str, layer: nn.Module) -> PackedLinear | None:
        """The packed layer for one linear layer, with its sizes, on its device; None leaves it as it is.

        ``layer``: nn.Linear, or of a class with ``weight_is_in_out``; call ``packed.stand_in_for(layer)``.
        """

    def skipped(self, default: Sequence[str]) -> list[str]:
        """Names of modules to leave as they are: the configuration's ``modules_to_not_convert``, else ``default``."""
        given = getattr(self.config, "modules_to_not_convert", None)
        return list(default if given is None else given)

    def replace(self, model: nn.Module, default_skips: Sequence[str] = (), more_skips: Sequence[str] = ()) -> list[str]:
        """Put packed layers into the model; their names. ``more_skips`` are left as they are in any case."""
        return replace_linears(model, self._converted, [*self.skipped(default_skips), *more_skips])

    def _converted(self, name: str, layer: nn.Module) -> PackedLinear | None:
        packed = self.convert(name, layer)
        if packed is not None:
            packed.loads_packed = self.pre_quantized
        return packed

    def skipped_by_place(self, places: dict[str, Any]) -> list[str]:
        """Names of modules to leave as they are for where a ``device_map`` dictionary puts them; default none."""
        return []

    def check(self, model: nn.Module) -> None:
        """Raise QuantizationError if the loaded model is not what it should be. Default: it has packed layers."""
        if not any(isinstance(module, PackedLinear) for module in model.modules()):
            raise QuantizationError(f"{type(model).__name__} was to be quantized and has no quantized layer")

    def dequantize(self, model: nn.Module, dtype: Any = None) -> list[str]:
        """Put plain layers with decoded weights in the place of packed ones; their names."""
        return dequantize_linears(model, dtype)
