"""Launching a kernel: on the device of its tensors, and seen by whoever wants to compile it without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Watcher = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_watcher: Watcher | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run ``kernel`` over ``grid`` with positional ``arguments``, the first of which is a tensor; ``options`` are its
    constexpr parameters by name, ``num_warps`` and ``num_stages``. An empty grid launches nothing. Products and sums
    are fused (one rounding), whatever Triton's default."""
    options = {"enable_fp_fusion": True, **options}
    if _watcher is not None:
        _watcher(kernel, grid, arguments, options)
        return
    if 0 in grid:
        return
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """While active, launches are handed to ``watcher`` and nothing runs: ahead-of-time compilation of real calls."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before
