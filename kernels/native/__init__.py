"""What is compiled when loadstone is installed: found, and described where it is not there."""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("loadstone.kernels")

MOST_ROWS = 16
_ROUNDING = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIDTH = 32  # numbers that the loop takes at a time


@lru_cache(maxsize=1)
def _find() -> tuple[ctypes.CDLL | None, str | None]:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_four_bit{suffix}"
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
                usable = library.loadstone_native()
            except (OSError, AttributeError) as error:
                return None, f"{path.name} cannot be loaded: {error}"
            return (library, None) if usable else (None, "it needs AVX-512, which this processor lacks")
    return None, "it was not compiled when loadstone was installed (no C compiler?); install loadstone again with one"


def why_not() -> str | None:
    """Why the compiled 4-bit product cannot run on this machine's CPU; None if it can."""
    return _find()[1]


@lru_cache(maxsize=1)
def _ready() -> bool:
    """Whether it can run; if not, a warning says so once, where it would have run."""
    reason = why_not()
    if reason is not None:
        logger.warning("4-bit weights are decoded whole for every token on this CPU, which is slow: %s", reason)
    return reason is None


def takes(x: Tensor, blocksize: int, width: int) -> bool:
    """Whether `linear_4bit` computes this: up to 16 rows on the CPU, of whole blocks."""
    rows = x.numel() // max(1, x.shape[-1])
    return (
        x.device.type == "cpu"
        and x.dtype in _ROUNDING
        and 0 < rows <= MOST_ROWS
        and blocksize % _WIDTH == 0
        and width % blocksize == 0
        and _ready()
    )


def linear_4bit(x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, outputs: int) -> Tensor:
    """``x @ weight.T``, the weight rounded to the dtype of x, the sum in fp32; see `takes`.

    x: (..., in_features). packed: (outputs * in_features / 2,) uint8. absmax: (blocks,) fp32. code: (16,) fp32.
    """
    library = _find()[0]
    assert library is not None
    width = x.shape[-1]
    flat = x.reshape(-1, width).float()
    apart = flat.view(-1, width // _WIDTH, _WIDTH // 2, 2).transpose(2, 3).contiguous()
    y = torch.empty(flat.shape[0], outputs)
    kept = [apart, packed.contiguous(), absmax.contiguous(), code.contiguous(), y]
    sizes = (flat.shape[0], outputs, width, blocksize, _ROUNDING[x.dtype], torch.get_num_threads())
    library.loadstone_linear_4bit(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in kept), *(ctypes.c_long(size) for size in sizes)
    )
    return y.to(x.dtype).view(*x.shape[:-1], outputs)
