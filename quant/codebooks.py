"""The numbers that codes stand for: NF4, FP4, and the 8-bit map of double quantization."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import QuantizationError

QUANT_TYPES = ("nf4", "fp4")

# Dettmers et al. 2023, arXiv:2305.14314, appendix E: quantiles of the normal distribution, rounded to fp32.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One sign, two exponent bits, one of mantissa: twelfths of these, whose positive half comes first.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@lru_cache(maxsize=8)
def codebook(quant_type: str) -> Tensor:
    """The 16 numbers of a 4-bit type by code, (16,) fp32 on the CPU; not to be written to.

    quant_type: "nf4" or "fp4". Raises QuantizationError for another.
    """
    if quant_type == "nf4":
        return torch.tensor(_NF4, dtype=torch.float32)
    if quant_type == "fp4":
        positive = torch.tensor(_FP4, dtype=torch.float32) / 12.0
        return torch.cat((positive, 0.0 - positive))  # code 8 is +0.0 too
    raise QuantizationError(f"unknown 4-bit type {quant_type!r}; there are: {', '.join(QUANT_TYPES)}")


@lru_cache(maxsize=8)
def boundaries(quant_type: str) -> tuple[Tensor, Tensor]:
    """(bounds (15,) fp32 ascending, codes (16,) uint8): x / absmax has ``codes[how many bounds are below]``.

    The bounds are the midpoints of neighbouring numbers of `codebook`, and one that is hit belongs to the lower number.
    FP4 has two zeros: 0 and what is just below it get code 0, what is just above it code 8.
    """
    numbers = codebook(quant_type).tolist()
    order = sorted(range(16), key=lambda code: numbers[code])
    ascending = codebook(quant_type)[order]
    return (ascending[:-1] + ascending[1:]) / 2, torch.tensor(order, dtype=torch.uint8)


@lru_cache(maxsize=1)
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map, (256,) fp32 ascending on the CPU; not to be written to.

    Dettmers 2015, arXiv:1511.04561: a number of the decade 10^-e is one of 2^(6 - e) evenly spaced ones.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        decade = (10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        numbers += decade.tolist() + (-decade).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32)
