"""Packed layers whose product decodes the weight, some output columns at a time, and keeps nothing decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import QuantizationError
from .packed import PackedLinear

CHUNK = 1 << 20  # numbers worked on at a time


class DecodedLinear(PackedLinear):
    """(..., in_features) → (..., out_features), in the dtype of the input. A subclass writes `decode`.

    ``columns_together``: decoding starts at a multiple of so many output columns.
    """

    columns_together: ClassVar[int] = 1

    def decode(self, start: int, stop: int) -> Tensor:
        """Columns of the weight, (in_features, stop - start) fp32; ``start`` is a multiple of `columns_together`."""
        raise QuantizationError(f"{type(self).__name__} does not decode")

    def product(self, rows: Tensor) -> Tensor | None:
        """(n, in_features) → (n, out_features) by another way than decoding, or None where there is none."""
        return None

    @property
    def columns_at_once(self) -> int:
        """How many output columns are decoded at a time."""
        return max(1, CHUNK // self.in_features // self.columns_together) * self.columns_together

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, columns of the weight in ``dtype``), one after the other."""
        for start in range(0, self.out_features, self.columns_at_once):
            stop = min(start + self.columns_at_once, self.out_features)
            yield start, stop, self.decode(start, stop).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features); gradients reach the input and the bias."""
        out: Tensor = _Product.apply(input, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), in ``dtype`` or that of the layer before it was quantized."""
        dtype = dtype or self.source_dtype
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        for start, stop, columns in self.chunks(dtype):
            weight[start:stop] = columns.t()
        return weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: DecodedLinear) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = layer.product(rows) if rows.shape[0] else None
        if out is None:
            out = rows.new_empty(rows.shape[0], layer.out_features)
            for start, stop, columns in layer.chunks(x.dtype):
                out[:, start:stop] = rows @ columns
        return out.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows = grad.reshape(-1, grad.shape[-1])
        # Summed over chunks: in fp32, so that their number does not show.
        wide = torch.promote_types(grad.dtype, torch.float32)
        out = torch.zeros(rows.shape[0], ctx.layer.in_features, dtype=wide, device=grad.device)
        for start, stop, columns in ctx.layer.chunks(grad.dtype):
            out += rows[:, start:stop] @ columns.t()
        return out.to(grad.dtype).view(*grad.shape[:-1], ctx.layer.in_features), None
