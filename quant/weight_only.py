"""The method "weight_only": int8 or int4 weights in the forms that torch's own products take, inputs left as they are.

No calibration, no other library. Files hold plain tensors. 8 bits: ``weight`` (out, in) int8 and ``scale`` (out,) fp32,
a number is ``code * scale``. 4 bits: ``weight`` (out, in / 2) uint8, the first of two codes in the high bits, and
``scale_and_zero`` (in / group, out, 2), a number is ``(code - 8) * scale + zero``.

A product of some bfloat16 rows is torch's (``_weight_int8pack_mm`` on the CPU; ``_weight_int4pack_mm_for_cpu``,
``_weight_int4pack_mm`` on a GPU from compute capability 8.0). All others, and sizes that these do not take, decode
about a million numbers at a time to the input's dtype and multiply: torch's products are many times slower there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizationError, nearest
from .decoded import CHUNK, DecodedLinear
from .int4_layout import Layout, join, layout_for, split
from .packed import PackedLinear, Recipe, holds_in_out
from .quantizer import Quantizer

GROUP_SIZES = (32, 64, 128, 256)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The most rows of input for torch's products; with more, decoding once and multiplying is faster. Measured on one core
# with AVX-512, 2048 x 2048, bfloat16: torch takes 0.1 ms a row, decoding 7 ms (int8) or 30 (int4), then little a row.
_MOST_INT8, _MOST_INT4 = 64, 256


class WeightOnlyConfig:
    """int8 or int4 weights. bits: 8, a scale for each output, or 4, a scale and a zero for each group of inputs.

    group_size: 32, 64, 128 (default) or 256 inputs; for 4 bits only. modules_to_not_convert: names of modules to leave
    as they are, instead of the output head and what is tied to it. Raises QuantizationError for a value that is wrong.
    """

    quant_method: ClassVar[str] = "weight_only"

    def __init__(
        self, bits: int = 8, group_size: int | None = None, modules_to_not_convert: list[str] | None = None
    ) -> None:
        if type(bits) is not int or bits not in (4, 8):
            raise QuantizationError(f"WeightOnlyConfig: bits must be 8 or 4; got {bits!r}")
        if bits == 8 and group_size is not None:
            raise QuantizationError(f"WeightOnlyConfig: group_size={group_size!r} is for 4 bits; leave it out for 8")
        if bits == 4 and group_size is None:
            group_size = 128
        if bits == 4 and (type(group_size) is not int or group_size not in GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise QuantizationError(f"WeightOnlyConfig: group_size must be one of {sizes}; got {group_size!r}")
        names = modules_to_not_convert
        if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(one, str) for one in names)):
            raise QuantizationError(f"WeightOnlyConfig: modules_to_not_convert must be a list of names; got {names!r}")
        self.bits, self.group_size = bits, group_size
        self.modules_to_not_convert = None if names is None else list(names)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> WeightOnlyConfig:
        """Build from a JSON object. Raises QuantizationError, for unknown fields too: they would mean something."""
        if not isinstance(config_dict, Mapping):
            raise QuantizationError(f"quantization_config must be an object, got {type(config_dict).__name__}")
        values = {str(name): value for name, value in config_dict.items() if name != "quant_method"}
        for name in values:
            if name not in ("bits", "group_size", "modules_to_not_convert"):
                hint = nearest(name, ("bits", "group_size", "modules_to_not_convert"))
                raise QuantizationError(f"weight_only: unknown field {name!r} in quantization_config{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        return {"quant_method": self.quant_method, **copy.deepcopy(self.__dict__)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightOnlyConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"


class WeightOnlyLinear(DecodedLinear):
    """What both layers share."""

    columns_together = 64  # whole tiles of any layout

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """{attribute: tensor} of a floating-point weight (out_features, in_features)."""
        raise QuantizationError(f"{type(self).__name__} does not encode")

    def load_recipe(self, attribute: str) -> Recipe | None:
        """A floating-point ``weight`` becomes all tensors but the bias."""
        if attribute != "weight":
            return None
        in_out = self.transposed

        def run(weight: Tensor) -> dict[str, Tensor]:
            return self.encode(weight.t().contiguous() if in_out else weight)

        return Recipe(self.source_shape, self.source_dtype, tuple(self.packed_attributes()), run)


class Int8WeightOnlyLinear(WeightOnlyLinear):
    """int8 weights, a scale for each output."""

    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.float32, device=device))

    def decode(self, start: int, stop: int) -> Tensor:
        """Columns of the weight, (in_features, stop - start) fp32."""
        return (self.weight[start:stop] * self.scale[start:stop].unsqueeze(1)).t()

    def product(self, rows: Tensor) -> Tensor | None:
        """torch's, for up to 64 rows of bfloat16 on the CPU."""
        if rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or rows.shape[0] > _MOST_INT8:
            return None
        return torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale.to(rows.dtype))

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The layer's tensors from a weight; see `quantize_int8`."""
        codes, scale = quantize_int8(weight)
        return {"weight": codes, "scale": scale}


class Int4WeightOnlyLinear(WeightOnlyLinear):
    """int4 weights, a scale and a zero for each group of inputs.

    Where torch has a product for the device, the codes are held in the order it wants (`int4_layout`); state dicts and
    files have the plain one, so a ``state_dict()`` of such a layer is a copy.
    """

    own_dtype = ("scale_and_zero",)
    scale_and_zero: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.group_size = group_size
        self.tiled = False  # whether the codes are in the order of `layout`
        codes = torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device)
        self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        pairs = torch.zeros(in_features // group_size, out_features, 2, dtype=self.source_dtype, device=device)
        self.register_buffer("scale_and_zero", pairs)

    @property
    def layout(self) -> Layout | None:
        """The order of the codes, None for that of files."""
        return layout_for(self.weight.device, self.out_features, self.in_features) if self.tiled else None

    def decode(self, start: int, stop: int) -> Tensor:
        """Columns of the weight, (in_features, stop - start) fp32; ``start`` is a multiple of 64."""
        part, layout = self.weight[start:stop], self.layout
        codes = split(part) if layout is None else layout.codes(part)
        scale, zero = self.scale_and_zero[:, start:stop].float().permute(2, 1, 0).unsqueeze(3)
        rows = codes.float().sub_(8).view(stop - start, -1, self.group_size)
        return torch.addcmul(zero, rows, scale).flatten(1).t()

    def product(self, rows: Tensor) -> Tensor | None:
        """torch's, for up to 256 rows of bfloat16 where the codes are in its order."""
        if not self.tiled or rows.dtype != torch.bfloat16 or rows.shape[0] > _MOST_INT4:
            return None
        rows, pairs = rows.contiguous(), self.scale_and_zero
        if rows.device.type == "cpu":
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, pairs)
        tiles = self.weight.view(torch.int32).view(self.out_features // 8, self.in_features // 128, 32, 4)
        return torch.ops.aten._weight_int4pack_mm(rows, tiles, self.group_size, pairs)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The layer's tensors from a weight; see `quantize_int4`."""
        codes, pairs = quantize_int4(weight, self.group_size)
        return {"weight": codes, "scale_and_zero": pairs}

    def check_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Raise QuantizationError for scales of a dtype that this method does not write."""
        dtype = parts["scale_and_zero"].dtype
        if dtype not in _DTYPES:
            raise QuantizationError(f"its scale_and_zero is {dtype}, not one of {', '.join(map(str, _DTYPES))}")

    def loaded(self) -> None:
        """Put the codes, which came in the plain order, into the one that the device's product wants."""
        pairs = self.scale_and_zero
        layout = None
        if pairs.dtype == torch.bfloat16:
            layout = layout_for(pairs.device, self.out_features, self.in_features)
        self.tiled = layout is not None
        if layout is not None:
            self._parameters["weight"] = nn.Parameter(layout.packed(self.weight.detach()), requires_grad=False)

    def plain(self) -> Tensor:
        """The codes as files hold them, (out_features, in_features / 2) uint8; a copy if they are held otherwise."""
        layout, held = self.layout, self.weight.detach()
        if layout is None:
            return held
        return torch.cat([join(layout.codes(part)) for part in held.split(self.columns_at_once)])

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, in the plain order."""
        return {**super().parts(), "weight": self.plain()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        here = self.weight.device
        if not self.tiled or fn(torch.empty(0, device=here)).device == here:
            return super()._apply(fn, recurse)
        self._parameters["weight"] = nn.Parameter(self.plain(), requires_grad=False)
        self.tiled = False
        result = super()._apply(fn, recurse)
        self.loaded()
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled:
            destination[f"{prefix}weight"] = self.plain()

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: in the plain order, which every machine reads."""
        state = dict(self.__dict__)
        if self.tiled:
            plain = nn.Parameter(self.plain(), requires_grad=False)
            state |= {"tiled": False, "_parameters": {**self._parameters, "weight": plain}}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.loaded()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (out, in) int8, scale (out,) fp32): the largest magnitude of each row is 127; off by half a scale at most.

    weight: (out, in), fp32, fp16 or bf16. Raises QuantizationError for another, or one with infinities or NaN.
    """
    _check(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    step = max(1, CHUNK // weight.shape[1])
    for part, target, size in zip(weight.split(step), codes.split(step), scale.split(step), strict=True):
        rows = part.float()
        torch.div(rows.abs().amax(1), 127.0, out=size)
        target.copy_((rows / _divisor(size).unsqueeze(1)).round_().clamp_(-127, 127))
    _check_finite(weight, scale)
    return codes, scale


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(codes (out, in / 2) uint8, (in / group_size, out, 2) in the dtype of ``weight``: scale and zero of each group).

    The codes of a group span its numbers and 0, and are chosen for scale and zero as rounded to that dtype: off by half
    a scale at most, and what rounding these costs at the ends.
    weight: (out, in), fp32, fp16 or bf16. Raises QuantizationError for another, or one with infinities or NaN.
    """
    _check(weight)
    out, inputs = weight.shape
    codes = torch.empty(out, inputs // 2, dtype=torch.uint8, device=weight.device)
    pairs = torch.empty(inputs // group_size, out, 2, dtype=weight.dtype, device=weight.device)
    step = max(1, CHUNK // inputs)
    for start in range(0, out, step):
        groups = weight[start : start + step].float().unflatten(1, (-1, group_size))
        low, high = groups.aminmax(dim=2)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _divisor(((high - low) / 15).to(weight.dtype).float())
        zero = (low + 8 * scale).to(weight.dtype).float()
        zero = torch.where(low == high, 0.0, zero)
        found = ((groups - zero.unsqueeze(2)) / scale.unsqueeze(2)).round_().add_(8).clamp_(0, 15)
        codes[start : start + step] = join(found.flatten(1).to(torch.uint8))
        pairs[:, start : start + step] = torch.stack((scale, zero), 2).transpose(0, 1).to(weight.dtype)
    _check_finite(weight, pairs)
    return codes, pairs


def _divisor(scale: Tensor) -> Tensor:
    """1 for a scale of 0, of numbers that are all 0 or too small for it."""
    return torch.where(scale == 0, 1.0, scale)


def _check(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.dtype not in _DTYPES or weight.numel() == 0:
        raise QuantizationError(
            "int8 and int4 weights are made of matrices of float32, float16 or bfloat16 that are not empty, not of a "
            f"tensor of shape {tuple(weight.shape)} and {weight.dtype}"
        )


def _check_finite(weight: Tensor, scales: Tensor) -> None:
    if not bool(scales.isfinite().all()):
        raise QuantizationError(
            f"a weight of shape {tuple(weight.shape)} holds infinities or NaN (or spans more than its dtype can say); "
            "repair the checkpoint, or list the module in modules_to_not_convert"
        )


class WeightOnlyQuantizer(Quantizer):
    """Makes and reads int8 and int4 weights."""

    config: WeightOnlyConfig

    def convert(self, name: str, layer: nn.Module) -> PackedLinear:
        """The layer for the configuration's bits."""
        size = self.config.group_size
        if size is None:
            return Int8WeightOnlyLinear.from_linear(layer)
        weight: Any = layer.weight
        inputs = weight.shape[0 if holds_in_out(layer) else 1]
        if inputs % size:
            fitting = [one for one in GROUP_SIZES if inputs % one == 0]
            advice = f"use {fitting[-1]} or list" if fitting else "list"
            raise QuantizationError(
                f"{name} has {inputs} inputs, no multiple of group_size={size}; {advice} it in modules_to_not_convert"
            )
        return Int4WeightOnlyLinear.from_linear(layer, group_size=size)
