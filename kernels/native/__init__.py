"""What is compiled when loadstone is installed: found, and described where it is not there."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...errors import KernelError

logger = logging.getLogger("loadstone.kernels")

MOST_ROWS, MOST_ROWS_OF_PAIRS = 16, 128  # beyond which it is faster to decode the weight and multiply as always
_LIBRARY = "four_bit.shared.so"  # as setup.py names it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALES_FOR_THREADS = 1 << 14
_WIDTH = 32  # numbers that the loop takes at a time


@cache
def _find() -> tuple[ctypes.CDLL | None, str | None]:
    path = Path(__file__).parent / _LIBRARY
    if not path.is_file():
        return (
            None,
            "it was not compiled when loadstone was installed (no C compiler?); install loadstone again with one",
        )
    try:
        library = ctypes.CDLL(str(path))
        level = library.loadstone_native()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    return (library, None) if level else (None, "it needs AVX-512, which this processor lacks")


def _library() -> ctypes.CDLL:
    library, reason = _find()
    if library is None:
        raise KernelError(f"compiled code cannot run: {reason}")
    return library


@cache
def _pairs(dtype: torch.dtype) -> bool:
    """Whether inputs are multiplied as they are (AVX512-BF16), not as fp32."""
    return dtype == torch.bfloat16 and _library().loadstone_native() == 2


def why_not() -> str | None:
    """Why compiled code cannot run on this machine's CPU; None if it can."""
    return _find()[1]


@cache
def _warn() -> None:
    logger.warning("4-bit weights are decoded by torch on this CPU, for every token anew, which is slow: %s", why_not())


def warn() -> None:
    """Say once that compiled code would have run here, and why it does not."""
    _warn()


# What torch.compiler.assume_constant_result does, without importing the compiler: they are called, not traced.
for _constant in (why_not, warn):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def supports_linear_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None
) -> str | None:
    """Why compiled code does not compute this product; None if it does."""
    return _why_not_4bit(x.dtype, blocksize)


def supports_dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> str | None:
    """Why compiled code does not decode this; None if it does."""
    return _why_not_4bit(dtype, blocksize)


def _why_not_4bit(dtype: torch.dtype, blocksize: int) -> str | None:
    if dtype not in _DTYPES:
        return f"it is for fp32, bf16 and fp16, not {dtype}"
    return None if blocksize % _WIDTH == 0 else f"blocks of {blocksize} numbers are no multiple of {_WIDTH}"


def dequantize_absmax(codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int) -> Tensor:
    """Scales from their codes; see `loadstone.kernels.scales`."""
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads() if codes.numel() >= _SCALES_FOR_THREADS else 1
    _library().loadstone_dequantize_absmax(
        *_addresses([codes.contiguous(), absmax.contiguous(), code.contiguous(), out]),
        ctypes.c_float(offset),
        *_numbers(codes.numel(), blocksize, threads),
    )
    return out


def takes_rows(rows: int, dtype: torch.dtype, blocksize: int, width: int) -> bool:
    """Whether `linear_4bit` computes this: few rows, and blocks that end where rows do."""
    most = MOST_ROWS_OF_PAIRS if _pairs(dtype) else MOST_ROWS
    return 0 < rows <= most and width % blocksize == 0


def decode_4bit(code: Tensor, out: Tensor, packed: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Fill ``out``, flat, from its codes; see `supports_dequantize_4bit`."""
    kept = [packed.contiguous(), absmax.contiguous(), code.contiguous(), out]
    _library().loadstone_dequantize_4bit(
        *_addresses(kept), *_numbers(out.numel(), blocksize, _DTYPES[out.dtype], torch.get_num_threads())
    )


def linear_4bit(x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, outputs: int) -> Tensor:
    """``x @ weight.T`` in fp32, the weight rounded to the dtype of x; see `takes_rows`.

    x: (rows, in_features). packed: (outputs * in_features / 2,) uint8. absmax: (blocks,) fp32. code: (16,) fp32.
    Returns (rows, outputs) fp32. Products of bf16 are exact and summed in fp32; with AVX512-BF16, subnormal numbers
    count as zero.
    """
    rows, width = x.shape
    pairs = _pairs(x.dtype)
    inputs = x.contiguous() if pairs else x.float().contiguous()
    y = torch.empty(rows, outputs, dtype=torch.float32, device="cpu")
    kept = [inputs, torch.empty_like(inputs), packed.contiguous(), absmax.contiguous(), code.contiguous(), y]
    sizes = (rows, outputs, width, blocksize, _DTYPES[x.dtype], int(pairs), torch.get_num_threads())
    _library().loadstone_linear_4bit(*_addresses(kept), *_numbers(*sizes))
    return y


def _addresses(tensors: Sequence[Tensor]) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _numbers(*sizes: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(size) for size in sizes]
