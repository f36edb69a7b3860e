"""What is compiled when loadstone is installed: found, and described where it is not there."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError

logger = logging.getLogger("loadstone.kernels")

LEVELS = ("avx2", "avx512", "avx512bf16")  # as the compiled code numbers them, from 1 on
VARIABLE = "LOADSTONE_NATIVE"
_LIBRARY = "four_bit.shared.so"  # as setup.py names it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VERSION = 2  # of the compiled calls, as four_bit.c has it
_SCALES_FOR_THREADS = 1 << 14
_WIDTH = 32  # numbers that the loop takes at a time
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "loadstone_linear_4bit": [*[_POINTER] * 5, *[_LONG] * 5, _POINTER, _POINTER, _FLOAT, *[_LONG] * 3],
    "loadstone_dequantize_4bit": [*[_POINTER] * 4, *[_LONG] * 5],
    "loadstone_dequantize_absmax": [*[_POINTER] * 4, _FLOAT, *[_LONG] * 4],
}


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
        if not hasattr(library, "loadstone_version") or library.loadstone_version() != _VERSION:
            return None, f"{path.name} was compiled from the source of another version; install loadstone again"
        if not library.loadstone_native():
            return None, "it needs an x86-64 processor with AVX2, FMA and F16C, and Linux"
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    return library, None


def _library() -> ctypes.CDLL:
    library, reason = _find()
    if library is None:
        raise KernelError(f"compiled code cannot run: {reason}")
    return library


def levels() -> tuple[str, ...]:
    """Those of `LEVELS` that this processor has. Raises KernelError where compiled code cannot run."""
    return LEVELS[: _library().loadstone_native()]


@cache
def level() -> str:
    """Which of `LEVELS` runs: the highest of this processor, or what ``$LOADSTONE_NATIVE`` says.

    Raises KernelError if that is no level, or one above this processor's, and where compiled code cannot run.
    """
    here = levels()
    asked = os.environ.get(VARIABLE) or here[-1]
    if asked not in here:
        raise KernelError(f"${VARIABLE} is {asked!r}; this processor has {', '.join(here)}")
    return asked


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
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], bias: Tensor | None,
    *nested: Any,
) -> str | None:  # fmt: skip
    """Why compiled code does not compute this product; None if it does."""
    return why_not_4bit(x.dtype, blocksize)


def supports_dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> str | None:
    """Why compiled code does not decode this; None if it does."""
    return why_not_4bit(dtype, blocksize)


def why_not_4bit(dtype: torch.dtype, blocksize: int) -> str | None:
    """Why compiled code takes no 4-bit weights of such blocks for that dtype; None if it does."""
    if dtype not in _DTYPES:
        return f"it is for fp32, bf16 and fp16, not {dtype}"
    return None if blocksize % _WIDTH == 0 else f"blocks of {blocksize} numbers are no multiple of {_WIDTH}"


def dequantize_absmax(codes: Tensor, absmax: Tensor, code: Tensor, offset: float, blocksize: int) -> Tensor:
    """Scales from their codes; see `loadstone.kernels.scales`."""
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    codes, absmax, code = codes.contiguous(), absmax.contiguous(), code.contiguous()
    threads = torch.get_num_threads() if codes.numel() >= _SCALES_FOR_THREADS else 1
    _library().loadstone_dequantize_absmax(
        codes.data_ptr(), absmax.data_ptr(), code.data_ptr(), out.data_ptr(), offset, codes.numel(), blocksize,
        _number_of(level()), threads,
    )  # fmt: skip
    return out


def takes_rows(rows: int, dtype: torch.dtype, blocksize: int, width: int) -> bool:
    """Whether `linear_4bit` computes this: few rows, and blocks that end where rows do."""
    return 0 < rows <= most_rows(dtype) and width % blocksize == 0


def most_rows(dtype: torch.dtype) -> int:
    """Rows beyond which it is faster to decode the weight and multiply as always."""
    return 128 if dtype == torch.bfloat16 and level() == "avx512bf16" else 32


def decode_4bit(code: Tensor, out: Tensor, packed: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Fill ``out``, flat, from its codes; see `supports_dequantize_4bit`."""
    packed, absmax, code = packed.contiguous(), absmax.contiguous(), code.contiguous()
    _library().loadstone_dequantize_4bit(
        packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), out.data_ptr(), out.numel(), blocksize,
        _DTYPES[out.dtype], _number_of(level()), torch.get_num_threads(),
    )  # fmt: skip


def linear_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, outputs: int,
    nested_absmax: Tensor | None = None, nested_code: Tensor | None = None, offset: float = 0.0,
    nested_blocksize: int = 1,
) -> Tensor:  # fmt: skip
    """``x @ weight.T`` in fp32, the weight rounded to the dtype of x; see `takes_rows`.

    x: (rows, in_features). packed: (outputs * in_features / 2,) uint8. absmax: (blocks,) fp32, or uint8 with what
    `dequantize_absmax` calls absmax, code, offset and blocksize. code: (16,) fp32. Returns (rows, outputs) fp32.
    Products of bf16 are exact and summed in fp32; with AVX512-BF16, subnormal numbers count as zero.
    Raises MemoryError if there is none for its working space.
    """
    rows, width = x.shape
    y = torch.empty(rows, outputs, dtype=torch.float32, device="cpu")
    x, packed, absmax, code = x.contiguous(), packed.contiguous(), absmax.contiguous(), code.contiguous()
    if nested_absmax is not None and nested_code is not None:
        nested_absmax, nested_code = nested_absmax.contiguous(), nested_code.contiguous()
    if _library().loadstone_linear_4bit(
        x.data_ptr(), packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), y.data_ptr(),
        rows, outputs, width, blocksize, _DTYPES[x.dtype],
        None if nested_absmax is None else nested_absmax.data_ptr(),
        None if nested_code is None else nested_code.data_ptr(),
        offset, nested_blocksize, _number_of(level()), torch.get_num_threads(),
    ):  # fmt: skip
        raise MemoryError(f"no memory for the working space of a 4-bit product of {rows} rows, {width} wide")
    return y


def _number_of(level: str) -> int:
    return LEVELS.index(level) + 1
