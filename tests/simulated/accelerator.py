"""An accelerator that is not there: devices ``sim:0`` to ``sim:2``, whose tensors lie in ordinary memory.

It is a real backend to torch (PrivateUse1, in Python), so placement, hooks and moves are the ones that run on a GPU: a
tensor on one device cannot be used with one on another, and is not the CPU's. What is slow or asynchronous on a GPU is
not so here. Importing this changes torch for the whole process: only files run by test_simulated.py may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME, COUNT = "sim", 3
MEMORY = {"free": 1 << 30}


class _Module:
    """What ``torch.sim`` is."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return 0

    def set_device(self, index: int) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY["free"], MEMORY["free"]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class SimTensor(torch.Tensor):
    """A tensor on a simulated device; ``inner`` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type, inner: Tensor, device: torch.device) -> SimTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        self.inner = inner

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory in which the values lie, which views share."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_options: Any) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


_BETWEEN_DEVICES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the tensors inside, refusing those that a GPU would refuse."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, SimTensor)}
    if func not in _BETWEEN_DEVICES and len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {devices} in {func}")
    device = next((device for device in devices if device.type == NAME), torch.device("cpu"))
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        device = torch.device(NAME, device.index or 0) if device.type == NAME else device
    inner_args, inner_kwargs = pytree.tree_map_only(SimTensor, lambda tensor: tensor.inner, (args, dict(kwargs)))
    if "device" in inner_kwargs:
        inner_kwargs["device"] = torch.device("cpu")
    if func is torch.ops.aten.copy_.default:
        inner_args[0].copy_(inner_args[1])
        return args[0]
    out = func(*inner_args, **inner_kwargs)
    written = [
        arg
        for parameter, arg in zip(func._schema.arguments, args, strict=False)
        if parameter.alias_info is not None and parameter.alias_info.is_write
    ]
    if written and len(func._schema.returns) == 1:
        return written[0]
    if device.type != NAME:
        return out
    return pytree.tree_map_only(
        Tensor, lambda tensor: tensor if isinstance(tensor, SimTensor) else SimTensor(tensor, device), out
    )


def _fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    return run(func, args, kwargs)


_setup_privateuseone_for_python_backend(NAME, _Module(), _Hook(), _Guard())
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_fallback, "PrivateUse1")
_make_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """torch.tensor, which fills its result behind the back of a backend written in Python."""
    if device is None or torch.device(device).type != NAME:
        return _make_tensor(data, device=device, **options)
    return _make_tensor(data, device="cpu", **options).to(device)


torch.tensor = _tensor
