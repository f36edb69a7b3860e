"""Where Triton kernels can run: what is asked before one is chosen."""

from __future__ import annotations

import importlib.util
import os

import torch


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # a finder that forbids it
        return False


MINIMUM_CAPABILITY = (8, 0)  # bf16 matrix instructions and asynchronous copies
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
_INSTALLED = _installed("triton")
# Dictionaries, not lru_cache: compilers trace through these functions, and warn of the latter.
_REASONS: dict[tuple[str, int | None], str | None] = {}


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on any device and slowly (``TRITON_INTERPRET=1``)."""
    return _INTERPRETING


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, None if they can.

    They run on NVIDIA GPUs of compute capability 8.0 or later and on AMD GPUs with torch's ROCm build; in Triton's
    interpreter, when that is on, on the CPU too.
    """
    if not _INSTALLED:
        return "the package triton is not installed (pip install triton)"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"Triton kernels run on a GPU, the tensors are on {device.type!r}"
    key = (device.type, device.index)
    if key not in _REASONS:
        _REASONS[key] = _gpu_too_old(device.index)
    return _REASONS[key]


def _gpu_too_old(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= MINIMUM_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    return f"{name} has compute capability {capability[0]}.{capability[1]}, 8.0 or later is needed"


def prefers(device: torch.device) -> bool:
    """Whether "auto" takes Triton on a device: where it runs at full speed, which the interpreter does not."""
    return device.type == "cuda" and not interpreting() and why_not(device) is None


def no_gpu_at_all() -> str | None:
    """Why no device of this machine can run Triton kernels, None if one can."""
    if not _INSTALLED or interpreting():
        return why_not(torch.device("cpu"))
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    reasons = [why_not(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]
