"""NF4 and FP4: four bits a number and a scale for each block, byte for byte what bitsandbytes' CPU backend makes.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 (NF4, double quantization).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..errors import QuantizationError
from ..kernels import four_bit as kernel
from ..kernels.dispatch import AUTO, Kernels
from ..kernels.scales import NestedScales
from .codebooks import boundaries, codebook, dynamic_map
from .quant_state import BLOCK_SIZES, DTYPES, QuantState, packed_size

STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_NESTED_BLOCK = 256
_CHUNK = 1 << 18  # numbers worked on at a time: what is made of them stays in a core's cache
_LEAST = 1e-38  # a smaller scale is taken for this
_MIDDLE = 1 << 15  # the cell of 0
_CELL_ROOM = 0.02  # of a cell: an fp32 number below 65536 is rounded by at most 1 / 512
_UNSURE = 0x80
_ANY_UNSURE = -0x7F7F7F7F7F7F7F80  # 0x80 in each of eight bytes


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Four bits for each number of ``weight``, taken row by row, and the state that decodes them.

    weight: any shape, not empty, fp32, fp16 or bf16. quant_type: "nf4" or "fp4". blocksize: 32, 64, ... 4096 numbers
    share a scale, the largest magnitude among them. double_quant: the scales become 8 bits each. storage: the packed
    bytes are a view of them as this dtype, (ceil(n / 2) / itemsize, 1); the first of two numbers is in the high bits.
    The same bytes as bitsandbytes' CPU backend makes of any finite tensor; with double_quant, in as many threads, for
    the order in which torch adds up the mean of more than 32768 scales depends on that.
    Raises QuantizationError for an option that is none, a tensor that holds infinities or NaN (of which that backend
    makes blocks of NaN and of zeros) or, with double_quant, scales whose sum overflows, and for bytes that do not fill
    the storage dtype.
    """
    _check(weight, blocksize, storage)
    packed, absmax = encode_blocks(weight.reshape(-1), quant_type, blocksize)
    nested = None
    if double_quant:
        absmax, nested = nest_scales(absmax)
    code = codebook(quant_type).to(weight.device, copy=True)
    state = QuantState(absmax, tuple(weight.shape), weight.dtype, blocksize, quant_type, code, nested)
    return packed.view(storage).unsqueeze(1), state


def dequantize_4bit(
    packed: Tensor, state: QuantState, dtype: torch.dtype | None = None, *, kernels: Kernels = AUTO
) -> Tensor:
    """The numbers that packed codes stand for: code * scale in fp32, rounded to ``dtype`` (None: the original one).

    packed: as `quantize_4bit` made it, in any storage dtype. Returns a tensor of ``state.shape``.
    Raises QuantizationError if the packed bytes are not as many as the state says.
    """
    dtype = dtype or state.dtype
    return kernel.dequantize_4bit(
        packed_bytes(packed, state.shape),
        state.scales(kernels),
        state.code,
        state.blocksize,
        state.shape,
        dtype,
        kernels=kernels,
    )


def packed_bytes(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Packed codes of any storage dtype as they lie, (ceil(n / 2),) uint8, of a tensor of ``shape``.

    Raises QuantizationError if they are not as many as that has.
    """
    if packed.nbytes != (size := packed_size(shape)):
        raise QuantizationError(
            f"a 4-bit tensor of shape {shape} has {size} packed bytes, these are {packed.nbytes} "
            f"({tuple(packed.shape)}, {packed.dtype}); packed codes cannot be cast, only viewed, as another dtype"
        )
    flat = packed.reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def _check(weight: Tensor, blocksize: int, storage: torch.dtype) -> None:
    if weight.dtype not in DTYPES.values() or weight.numel() == 0:
        raise QuantizationError(
            f"4 bits hold tensors of {', '.join(DTYPES)} that are not empty, not one of shape {tuple(weight.shape)} "
            f"and {weight.dtype}"
        )
    if blocksize not in BLOCK_SIZES:
        raise QuantizationError(f"a blocksize of {blocksize} is none of {', '.join(map(str, BLOCK_SIZES))}")
    if storage not in STORAGE:
        raise QuantizationError(f"{storage} cannot store packed codes; use one of {', '.join(map(str, STORAGE))}")
    packed = (weight.numel() + 1) // 2
    if packed % storage.itemsize:
        raise QuantizationError(
            f"the {packed} packed bytes of a tensor of shape {tuple(weight.shape)} do not fill numbers of {storage}; "
            "store them as torch.uint8"
        )


def encode_blocks(flat: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed (ceil(n / 2),) uint8, absmax (blocks,) fp32) of numbers in a row, which begin where a block does."""
    whole = flat.numel() // blocksize * blocksize
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=flat.device)
    find = _Table(quant_type, min(whole, _CHUNK)) if flat.device.type == "cpu" else _Search(quant_type, flat.device)
    for start in range(0, whole, _CHUNK):
        part = flat[start : min(start + _CHUNK, whole)].view(-1, blocksize)
        largest = absmax[start // blocksize :][: part.shape[0]]
        largest.copy_(_largest(part))
        _pack(find(part, 1.0 / largest.clamp(min=_LEAST)), packed[start // 2 :][: part.numel() // 2])
    if whole < flat.numel():  # the last, short block is divided, not multiplied by a reciprocal
        part = flat[whole:].float()
        absmax[-1] = _largest(flat[whole:].view(1, -1))[0].clamp(min=_LEAST)
        codes = _Search(quant_type, flat.device).codes(part / absmax[-1])
        zero = _Search(quant_type, flat.device).codes(part.new_zeros(part.numel() % 2))
        _pack(torch.cat((codes, zero)), packed[whole // 2 :])
    return packed, absmax


def _largest(blocks: Tensor) -> Tensor:
    """The largest magnitude of each row, fp32. Raises QuantizationError if that is infinite or NaN."""
    kind, mask = (torch.int32, 0x7FFFFFFF) if blocks.dtype == torch.float32 else (torch.int16, 0x7FFF)
    # Without their sign, the bits of floating-point numbers are in the order of the numbers, and NaN is the largest.
    largest = (blocks.view(kind) & mask).amax(1).view(blocks.dtype).float()
    if not bool(largest.isfinite().all()):
        raise QuantizationError(
            "a tensor holds infinities or NaN, which no 4-bit code stands for; repair the checkpoint, or keep this "
            "module in full precision"
        )
    return largest


def _pack(codes: Tensor, out: Tensor) -> None:
    """Two codes a byte, the first in the high bits."""
    pairs = codes.view(torch.int16)  # the second code is in the high byte; only the low byte of the sum is kept
    out.copy_(torch.add(pairs >> 8, pairs, alpha=16))


class _Search:
    """Codes by searching among the bounds: the definition, and fast enough on a GPU."""

    def __init__(self, quant_type: str, device: torch.device) -> None:
        bounds, order = boundaries(quant_type)
        self.bounds, self.order = bounds.to(device), order.to(device)

    def __call__(self, blocks: Tensor, factors: Tensor) -> Tensor:
        return self.codes((blocks * factors.unsqueeze(1)).view(-1))

    def codes(self, scaled: Tensor) -> Tensor:
        return self.order[torch.bucketize(scaled, self.bounds, out_int32=True)]


class _Table:
    """The same codes by a table on a CPU, which has buffers for ``chunk`` numbers.

    [-1, 1] is cut in 65534 cells. A cell without a bound in it, or too near for rounding, has one code; the few numbers
    in other cells are searched for.
    """

    def __init__(self, quant_type: str, chunk: int) -> None:
        self.table = _cells(quant_type)
        self.search = _Search(quant_type, self.table.device)
        self.middle = torch.tensor(_MIDDLE, dtype=torch.float32)
        self.scaled = torch.empty(chunk, dtype=torch.float32)
        self.cells = torch.empty(chunk, dtype=torch.int32)
        self.codes = torch.empty(chunk, dtype=torch.uint8)

    def __call__(self, blocks: Tensor, factors: Tensor) -> Tensor:
        count, blocksize = blocks.numel(), blocks.shape[1]
        scaled, cells, codes = self.scaled[:count], self.cells[:count], self.codes[:count]
        scaled.view(-1, blocksize).copy_(blocks).mul_(factors.unsqueeze(1))
        cells.copy_(torch.add(self.middle, scaled, alpha=_MIDDLE - 1, out=scaled))
        torch.index_select(self.table, 0, cells, out=codes)
        eights = (codes.view(torch.int64) & _ANY_UNSURE).nonzero().view(-1)
        if eights.numel():
            again = blocks.view(-1, 8)[eights] * factors[eights * 8 // blocksize].unsqueeze(1)
            codes.view(-1, 8)[eights] = self.search.codes(again)
        return codes


@lru_cache(maxsize=4)
def _cells(quant_type: str) -> Tensor:
    """(65536,) uint8: the code of cell int(32768 + 32767 x) of each x in [-1, 1], plus 128 where there are several."""
    bounds, order = boundaries(quant_type)
    places = _MIDDLE + (_MIDDLE - 1) * bounds.double()
    table = order[torch.bucketize(torch.arange(2 * _MIDDLE, dtype=torch.float64), places)]
    for off in (-_CELL_ROOM, _CELL_ROOM):
        table[(places + off).long()] |= _UNSURE
    return table


def nest_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """All scales of a tensor as 8 bits each, and the state that decodes them."""
    code = dynamic_map().to(absmax.device, copy=True)
    mean = absmax.mean()
    apart = absmax - mean
    if not bool(apart.isfinite().all()):
        raise QuantizationError(
            "a tensor's scales are too large to be quantized in their turn: their sum, or a difference, is no float32; "
            "quantize it without double_quant"
        )
    blocks = -(-apart.numel() // _NESTED_BLOCK)
    padded = torch.nn.functional.pad(apart, (0, blocks * _NESTED_BLOCK - apart.numel())).view(blocks, _NESTED_BLOCK)
    largest = padded.abs().amax(1)
    scaled = (padded * (1.0 / largest).unsqueeze(1)).nan_to_num_(nan=-1.0).clamp_(-1, 1)
    found = _nearest_places().to(code.device)[((scaled + 1.0) * 0.5 * 65535 + 0.5).int()]
    return found.view(-1)[: apart.numel()].clone(), NestedScales(largest, code, mean.item(), _NESTED_BLOCK)


@lru_cache(maxsize=1)
def _nearest_places() -> Tensor:
    """(65536,) uint8: the code nearest to each of as many evenly spaced numbers in [-1, 1].

    This is how bitsandbytes finds codes: a number is first rounded to one of these.
    """
    code = dynamic_map()
    places = torch.arange(1 << 16, dtype=torch.float32) * 2.0 / 65535 - 1.0
    return torch.bucketize(places, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)
