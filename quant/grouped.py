"""What GPTQ and AWQ files have in common: codes in int32 words, a scale and a zero for each group of inputs.

A number is ``(code - zero) * scale``. Codes and zeros have few bits and scales eleven, so that fp32 holds the product
exactly and it is rounded once, to the dtype that is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from .decoded import DecodedLinear
from .quantizer import Quantizer

_LARGEST_GROUP = 1 << 24
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class GroupedLinear(DecodedLinear):
    """A linear layer of such a file: (..., in_features) → (..., out_features), in the dtype of the input.

    ``qweight``, ``qzeros`` (int32) and ``scales`` (groups, out_features) are buffers under the file's own names, never
    written to. Nothing decoded is kept: a forward decodes about a million numbers at a time, multiplies, and lets them
    go, which costs more than a plain layer's forward; `dequantize` is for whoever has the memory.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    own_dtype = ("scales",)  # a cast would change what is decoded
    columns_together = 32  # a multiple of the output columns that share words, at any number of bits

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, group_size: int, device: Any, dtype: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        del self._parameters["weight"]
        self.group_size = in_features if group_size == -1 else group_size
        self.groups = -(-in_features // self.group_size)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The codes, where others look for a layer's device."""
        return self.qweight

    def check_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Raise QuantizationError for scales of a dtype that no writer of these files uses."""
        dtype = parts["scales"].dtype
        if dtype not in _SCALES:
            raise QuantizationError(f"its scales are {dtype}, not one of {', '.join(map(str, _SCALES))}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
    """``(code - zero) * scale``, (in, columns) fp32.

    codes: (in, columns) int32, which is overwritten. zeros: (groups, columns) int32. scales: (groups, columns) of any
    floating-point dtype. groups: (in,) the group of each input, None for groups of one size in order.
    """
    if groups is not None:
        return codes.sub_(zeros[groups]).float().mul_(scales.float()[groups])
    apart = codes.unflatten(0, (scales.shape[0], -1)).sub_(zeros.unsqueeze(1))
    return apart.float().mul_(scales.float().unsqueeze(1)).flatten(0, 1)


def fields(words: Tensor, bits: int, dim: int = -1, shifts: Sequence[int] | None = None) -> Tensor:
    """Numbers of ``bits`` bits in (rows, columns) int32 words: int32, 32 / bits times as many along ``dim``.

    They follow each other from the low bits up, also over the ends of words (3 bits: 32 numbers in three words).
    shifts: where in its word each number is, if not there.
    """
    places = [bits * number for number in range(32 // bits if 32 % bits == 0 else 32)]
    at = torch.tensor(shifts or [place % 32 for place in places], dtype=torch.int32, device=words.device)
    at = at.unsqueeze(-1) if dim == 0 else at
    inner = 1 if dim == 0 else -1
    if 32 % bits == 0:
        found = words.unsqueeze(inner) >> at
    else:
        groups = words.unflatten(dim, (-1, bits)).long() & 0xFFFFFFFF
        low = torch.tensor([place // 32 for place in places], device=words.device)
        both = groups.index_select(inner, low) | groups.index_select(inner, (low + 1).clamp(max=bits - 1)) << 32
        found = (both >> at).int()
    return found.bitwise_and_((1 << bits) - 1).flatten(*((0, 1) if dim == 0 else (-2, -1)))


class FileConfig:
    """A ``quantization_config`` as a file holds it: checked where it matters, all else kept and written back.

    Attributes are its fields. Raises QuantizationError for a value that is wrong or not supported.
    """

    quant_method: ClassVar[str]
    bits: int
    group_size: int
    modules_to_not_convert: list[str] | None

    def __init__(self, **values: Any) -> None:
        self.values = {**values, "quant_method": self.quant_method}
        self.group_size = self.whole("group_size", 128)
        if self.group_size != -1 and not 1 <= self.group_size <= _LARGEST_GROUP:
            raise self.wrong("group_size", self.group_size, f"a number of inputs to {_LARGEST_GROUP}, or -1 for all")
        names = values.get("modules_to_not_convert")
        if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(one, str) for one in names)):
            raise self.wrong("modules_to_not_convert", names, "a list of module names, or null")
        self.modules_to_not_convert = None if names is None else list(names)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Any:
        """Build from a JSON object. Raises QuantizationError."""
        if not isinstance(config_dict, Mapping):
            raise QuantizationError(f"quantization_config must be an object, got {type(config_dict).__name__}")
        return cls(**{str(name): value for name, value in config_dict.items() if name != "quant_method"})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object this was built from."""
        return copy.deepcopy(self.values)

    def whole(self, field: str, default: int | None = None) -> int:
        """A field that must be a whole number."""
        value = self.values.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(field, value, "a whole number")
        return value

    def flag(self, field: str, default: bool) -> bool:
        """A field that must be true or false; null is the default."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(field, value, "true or false")
        return default if value is None else value

    def wrong(self, field: str, value: Any, wanted: str) -> QuantizationError:
        """The error for a field."""
        return QuantizationError(f"{self.quant_method}: {field} must be {wanted}; got {str(value)[:80]!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.values})"


class FileQuantizer(Quantizer):
    """Of methods that need calibration: their checkpoints are read and written, none is made."""

    can_quantize = False
    config: FileConfig

    def skipped(self, default: Sequence[str]) -> list[str]:
        """The default, and the configuration's ``modules_to_not_convert``."""
        return [*default, *(self.config.modules_to_not_convert or ())]


def check_width(name: str, layer: nn.Linear, per_word: int) -> None:
    """Raise QuantizationError unless the layer's features fill words of ``per_word`` numbers."""
    for what, size in (("in_features", layer.in_features), ("out_features", layer.out_features)):
        if size % per_word:
            raise QuantizationError(f"{name}: {what} is {size}, which does not fill words of {per_word} numbers")
