"""AWQ checkpoints: 4 bits a number, read and written in the Hub's "gemm" format. Quantizing is not done here.

Lin et al. 2023, arXiv:2306.00978. The format, as AutoAWQ 0.2 writes it, for a weight (out, in): ``qweight``
(in, out / 8) int32, ``qzeros`` (groups, out / 8) int32, ``scales`` (groups, out) fp16. Of the eight outputs in a word,
counted from the low bits, the order is 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from .grouped import FileConfig, FileQuantizer, GroupedLinear, check_width, fields, scaled
from .packed import PackedLinear

_SHIFTS = tuple(4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7))  # of outputs 0 to 7


class AwqConfig(FileConfig):
    """The ``quantization_config`` of an AWQ checkpoint.

    bits: 4. group_size: inputs that share a scale, -1 for all. version: "gemm". zero_point: the file's ``qzeros`` are
    used whatever it says. modules_to_not_convert: besides the output head.
    """

    quant_method: ClassVar[str] = "awq"

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.bits = self.whole("bits", 4)
        if self.bits != 4:
            raise self.wrong("bits", self.bits, "4")
        self.zero_point = self.flag("zero_point", True)
        version = values.get("version") or values.get("format") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise self.wrong("version", version, "'gemm': the layouts of 'gemv' and others are not read")


class AwqLinear(GroupedLinear):
    """A linear layer of an AWQ checkpoint; see `GroupedLinear` and the head of this file."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

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
        super().__init__(in_features, out_features, bias, group_size=group_size, device=device, dtype=dtype)
        for name, rows in (("qweight", in_features), ("qzeros", self.groups)):
            self.register_buffer(name, torch.zeros(rows, out_features // 8, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(self.groups, out_features, dtype=torch.float16, device=device))

    def decode(self, start: int, stop: int) -> Tensor:
        """Columns of the weight, (in_features, stop - start) fp32; ``start`` is a multiple of 32."""
        codes = fields(self.qweight[:, start // 8 : stop // 8], 4, shifts=_SHIFTS)
        zeros = fields(self.qzeros[:, start // 8 : stop // 8], 4, shifts=_SHIFTS)
        return scaled(codes, zeros, self.scales[:, start:stop], None)


class AwqQuantizer(FileQuantizer):
    """Reads AWQ checkpoints."""

    config: AwqConfig

    def convert(self, name: str, layer: nn.Module) -> PackedLinear:
        """An `AwqLinear`."""
        if not isinstance(layer, nn.Linear):
            raise QuantizationError(f"{name} is a {type(layer).__name__}: AWQ is read for nn.Linear only")
        check_width(name, layer, 8)
        size = self.config.group_size
        if size != -1 and layer.in_features % size:
            raise QuantizationError(f"{name}: in_features is {layer.in_features}, no multiple of group_size={size}")
        packed = AwqLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            group_size=size,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )
        packed.stand_in_for(layer)
        return packed
