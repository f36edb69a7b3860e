"""`Linear4bit` and `Linear8bitLt`: linear layers that hold 4-bit codes or int8 rows, with bitsandbytes' state dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, QuantizationError
from ..kernels import AUTO, Kernels
from ..kernels.four_bit import linear_4bit
from ..kernels.scales import NestedScales
from .codebooks import codebook, dynamic_map
from .config import QUANT_TYPES
from .eight_bit import dequantize_rows, linear_int8, quantize_rows
from .four_bit import dequantize_4bit, packed_bytes, quantize_4bit
from .packed import PackedLinear, Recipe
from .quant_state import QuantState
from .shares import Gather, Part, Share, as_codes, completed_4bit, part_of_4bit, part_of_8bit, refuse_shared
from .wrappers import mark_codes

_JSON = "quant_state.bitsandbytes__"
_NESTED_BLOCK = 256


class Linear4bit(PackedLinear):
    """A linear layer with NF4 or FP4 weights: (..., in_features) → (..., out_features), in the dtype of the input.

    compute_dtype: dtype of the product; None: that of the input. compress_statistics: double quantization, the block
    scales in 8 bits. quant_storage: dtype under which the packed bytes are held. blocksize: numbers that share a scale.
    dtype: of the weight before it was quantized and of the bias; default torch's.
    Built directly it is a layer of zeros: `from_linear`, or ``load_state_dict`` with packed or floating-point weights,
    fills it. Source: Dettmers et al. 2023, arXiv:2305.14314.
    """

    read_first = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")
    stay_on_cpu = ("quant_state",)
    shared_out = ("weight", "absmax", "nested_absmax")
    kernels: Kernels = AUTO
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor
    quant_state: Tensor

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
        *,
        dtype: torch.dtype | None = None,
        blocksize: int = 64,
    ) -> None:
        device = torch.get_default_device() if device is None else torch.device(device)
        super().__init__(input_features, output_features, bias, device=device, dtype=dtype)
        if quant_type not in QUANT_TYPES:
            raise QuantizationError(f"quant_type={quant_type!r} is none of {', '.join(QUANT_TYPES)}")
        self.compute_dtype, self.quant_type, self.blocksize = compute_dtype, quant_type, blocksize
        self.compress_statistics, self.quant_storage = compress_statistics, quant_storage
        self.nested_offset, self.nested_blocksize = 0.0, _NESTED_BLOCK
        self.text_room = 64 if compress_statistics else 0  # for the digits of the offset
        size = (input_features * output_features + 1) // 2
        if size % quant_storage.itemsize:
            raise QuantizationError(
                f"the {size} packed bytes of a ({output_features}, {input_features}) weight do not fill numbers of "
                f"{quant_storage}; set bnb_4bit_quant_storage to uint8"
            )
        packed = torch.zeros(size // quant_storage.itemsize, 1, dtype=quant_storage, device=device)
        self._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
        blocks = -(-input_features * output_features // blocksize)
        scale = torch.uint8 if compress_statistics else torch.float32
        self.register_buffer("absmax", torch.zeros(blocks, dtype=scale, device=device))
        self.register_buffer("quant_map", codebook(quant_type).to(device, copy=True))
        if compress_statistics:
            nested = -(-blocks // _NESTED_BLOCK)
            self.register_buffer("nested_absmax", torch.zeros(nested, dtype=torch.float32, device=device))
            self.register_buffer("nested_quant_map", dynamic_map().to(device, copy=True))
        text = self.weight_state.to_tensors()[_JSON + quant_type]
        self.register_buffer("quant_state", text.to("meta") if packed.is_meta else text)

    @property
    def checkpoint_names(self) -> Mapping[str, str]:  # type: ignore[override]
        """bitsandbytes' names of the buffers."""
        return _NAMES_4BIT[self.quant_type]

    def packed_attributes(self) -> list[str]:
        """The attributes that hold the weight, in bitsandbytes' order."""
        held = {**self._parameters, **self._buffers}
        return [name for name in ("weight", *self.checkpoint_names) if held.get(name) is not None]

    @property
    def weight_state(self) -> QuantState:
        """What decodes the packed weight, on its device."""
        absmax, nested = self._scales
        shape = (self.out_features, self.in_features)
        return QuantState(absmax, shape, self.source_dtype, self.blocksize, self.quant_type, self.quant_map, nested)

    @property
    def _scales(self) -> tuple[Tensor, NestedScales | None]:
        if not self.compress_statistics:
            return self.absmax, None
        nested = NestedScales(self.nested_absmax, self.nested_quant_map, self.nested_offset, self.nested_blocksize)
        return as_codes(self.absmax, torch.uint8), nested

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features); gradients reach the input and the bias."""
        x = input if self.compute_dtype in (None, input.dtype) else input.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        shape = (self.out_features, self.in_features)
        packed = packed_bytes(self.weight, shape)
        absmax, nested = self._scales
        out = linear_4bit(
            x, packed, absmax, self.quant_map, self.blocksize, shape, bias, nested=nested, kernels=self.kernels
        )
        return out if out.dtype == input.dtype else out.to(input.dtype)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), in ``dtype`` or that of the tensor which was quantized."""
        refuse_shared(self)
        return dequantize_4bit(self.weight, self.weight_state, dtype, kernels=self.kernels)

    def part_of(self, share: Share) -> Part:
        """See `shares.part_of_4bit`."""
        return part_of_4bit(self, share)

    def completed(self, parts: Mapping[str, Tensor], share: Share, gather: Gather) -> dict[str, Tensor]:
        """See `shares.completed_4bit`."""
        return completed_4bit(self, parts, share, gather)

    def load_recipe(self, attribute: str) -> Recipe | None:
        """A floating-point ``weight`` becomes all tensors but the bias."""
        if attribute != "weight":
            return None
        shape, in_out = self.source_shape, self.transposed
        options: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        options |= {"double_quant": self.compress_statistics, "storage": self.quant_storage}
        attributes = {name: attribute for attribute, name in self.checkpoint_names.items()}

        def run(weight: Tensor) -> dict[str, Tensor]:
            packed, state = quantize_4bit(weight.t().contiguous() if in_out else weight, **options)
            parts = {attributes[f"weight.{name}"]: tensor for name, tensor in state.to_tensors().items()}
            return {"weight": packed, **parts}

        makes = ("weight", *(name for name in attributes.values() if hasattr(self, name)))
        return Recipe(shape, self.source_dtype, makes, run)

    def accepts(self, attribute: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Scales of another block size, and their JSON, which has no fixed length."""
        return attribute in ("absmax", "nested_absmax", "quant_state") and len(shape) == 1

    def check_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Raise QuantizationError unless the state is sound, and of a weight of this layer's shape and type."""
        state = self._read(parts)
        shape = (self.out_features, self.in_features)
        if state.shape != shape:
            raise QuantizationError(f"its state is of a weight of shape {state.shape}, the layer's is {shape}")
        if (state.nested is not None) != self.compress_statistics:
            raise QuantizationError("its state and the configuration differ over double quantization")
        if parts["weight"].nbytes != state.packed_bytes:
            raise QuantizationError(
                f"it has {parts['weight'].nbytes} packed bytes, its state says {state.packed_bytes}"
            )

    def _read(self, parts: Mapping[str, Tensor]) -> QuantState:
        names = self.checkpoint_names
        try:
            return QuantState.from_tensors(
                {names[attribute].removeprefix("weight."): part for attribute, part in parts.items() if part is not None
                 and attribute in names}
            )  # fmt: skip
        except FormatError as error:
            raise QuantizationError(str(error)) from error

    def loaded(self) -> None:
        """Take over from the JSON what differs between weights: the offset of nested scales, sizes of blocks, dtype."""
        mark_codes(self)
        text: Any = self._buffers["quant_state"]
        if text.is_meta:
            return
        self._buffers["quant_state"] = text = text.cpu()
        facts = json.loads(bytes(text.tolist()))
        self.blocksize, self.source_dtype = facts["blocksize"], getattr(torch, facts["dtype"])
        self.nested_offset = facts.get("nested_offset", 0.0)
        self.nested_blocksize = facts.get("nested_blocksize", _NESTED_BLOCK)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant_type}, compute_dtype={self.compute_dtype}"


class Linear8bitLt(PackedLinear):
    """A linear layer with int8 weights, one scale a row: LLM.int8(); (..., in_features) → (..., out_features).

    threshold: input columns with a magnitude of at least this are multiplied in 16 bits; 0: none.
    has_fp16_weights: only False, weights are held in 8 bits. dtype: of the bias; default torch's.
    Built directly it is a layer of zeros, as `Linear4bit`. Source: Dettmers et al. 2022, arXiv:2208.07339.
    """

    read_first = ("SCB", "weight_format")
    stay_on_cpu = ("weight_format",)
    shared_out = ("weight", "SCB")
    kernels: Kernels = AUTO
    SCB: Tensor
    weight_format: Tensor

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = False,
        threshold: float = 6.0,
        device: Any = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        device = torch.get_default_device() if device is None else torch.device(device)
        super().__init__(input_features, output_features, bias, device=device, dtype=dtype)
        if has_fp16_weights:
            raise QuantizationError("has_fp16_weights=True is not available: weights are held in 8 bits")
        self.threshold = threshold
        rows = torch.zeros(output_features, input_features, dtype=torch.int8, device=device)
        self._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("SCB", torch.zeros(output_features, dtype=torch.float32, device=device))
        where = "meta" if rows.is_meta else "cpu"
        self.register_buffer("weight_format", torch.zeros((), dtype=torch.uint8, device=where))

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features); gradients reach the input and the bias."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        rows = as_codes(self.weight, torch.int8)
        return linear_int8(input, rows, self.SCB, bias, self.threshold, kernels=self.kernels)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), in ``dtype`` or that of the layer's bias and siblings."""
        refuse_shared(self)
        return dequantize_rows(self.weight, self.SCB, dtype or self.source_dtype)

    def part_of(self, share: Share) -> Part:
        """See `shares.part_of_8bit`."""
        return part_of_8bit(self, share)

    def completed(self, parts: Mapping[str, Tensor], share: Share, gather: Gather) -> dict[str, Tensor]:
        """The parts, and the mark of row-major layout."""
        return {**parts, "weight_format": torch.zeros((), dtype=torch.uint8, device="cpu")}

    def load_recipe(self, attribute: str) -> Recipe | None:
        """A floating-point ``weight`` becomes rows, their scales, and the mark of row-major layout."""
        if attribute != "weight":
            return None
        in_out = self.transposed

        def run(weight: Tensor) -> dict[str, Tensor]:
            rows, scb = quantize_rows(weight.t().contiguous() if in_out else weight)
            return {"weight": rows, "SCB": scb, "weight_format": torch.zeros((), dtype=torch.uint8, device="cpu")}

        return Recipe(self.source_shape, self.source_dtype, ("weight", "SCB", "weight_format"), run)

    def check_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Raise QuantizationError for a layout other than row-major, or scales that are no numbers."""
        if int(parts["weight_format"]) != 0:
            raise QuantizationError(
                f"its weight_format is {int(parts['weight_format'])}: int8 rows tiled for one kind of GPU, which are "
                "not read; quantize the original checkpoint again, or save with a newer bitsandbytes"
            )
        if not bool(parts["SCB"].isfinite().all()):
            raise QuantizationError("its scales (SCB) hold infinities or NaN")

    def loaded(self) -> None:
        """Bring the mark of the layout back to the CPU."""
        mark: Any = self._buffers["weight_format"]
        self._buffers["weight_format"] = mark if mark.is_meta else mark.cpu()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_NAMES_4BIT = {
    quant_type: {**{part: f"weight.{part}" for part in _PARTS_4BIT}, "quant_state": f"weight.{_JSON}{quant_type}"}
    for quant_type in QUANT_TYPES
}
