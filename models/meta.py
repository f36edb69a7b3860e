"""Building modules on the meta device: shapes and dtypes without memory, and without the cost of drawing values.

Notable: under ``torch.device("meta")`` every initialiser still runs, and its meta kernels import torch's symbolic
shapes (half a second, once). Here initialisers do nothing: what is built this way is filled by loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_META = torch.device("meta")
INITIALIZERS = frozenset(
    getattr(torch.nn.init, name)
    for name in (
        "uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "eye_", "dirac_", "xavier_uniform_",
        "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_",
    )
) | {
    getattr(Tensor, name)
    for name in ("uniform_", "normal_", "fill_", "zero_", "bernoulli_", "exponential_", "random_")
}  # fmt: skip
_FLOATING = frozenset({torch.empty, torch.ones, torch.zeros, torch.rand, torch.randn})
CONSTRUCTORS = frozenset(_device_constructors())


class MetaBuild(TorchFunctionMode):
    """Context in which tensors are made on meta, unless a device is given, and initialisers of meta tensors return.

    dtype: of floating-point tensors made without a dtype of their own.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONSTRUCTORS:
            if kwargs.get("device") is None:
                kwargs = {**kwargs, "device": _META}
            if func in _FLOATING and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": self.dtype}
            if func in _FLOATING and torch.device(kwargs["device"]) == _META:
                return self._empty(args, dict(kwargs))
        elif func in INITIALIZERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)

    @staticmethod
    def _empty(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """On meta ones, zeros and random numbers are all shape and dtype; `empty` needs no kernel to write them."""
        size = kwargs.pop("size", args)
        kwargs.pop("generator", None)
        return torch.empty(*size, **kwargs) if isinstance(size, tuple) else torch.empty(size, **kwargs)
