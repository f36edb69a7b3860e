"""One dispatch: models call operations, and what a model was told decides which implementation runs.

An operation (`rms_norm`, `linear_cross_entropy`, ...) has implementations by name: "torch", the reference that runs
everywhere, "triton", for some "native", compiled for the CPU when loadstone was installed, and what users register.
`Kernels` is what a model was told: one name for all operations, or one for some of them. "auto" takes Triton on a GPU
that can run it and compiled code on a CPU that can, for what these support, and torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, RegistrationError, nearest
from . import native, support

Supports = Callable[..., "str | None"]
"""Called with the operation's arguments; why an implementation cannot take them, or None if it can."""

BUILT_IN = ("auto", "torch", "triton", "native")


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    supports: Supports | None = None


# Operation -> name -> implementation. The Triton ones have a table of their own, filled when one is first wanted, for
# importing them imports triton; compilers hold a table to be what it was when they first looked at it.
_TABLE: dict[str, dict[str, _Implementation]] = {}
_TRITON: dict[str, _Implementation] = {}
_TRITON_HOMES: dict[str, str] = {}


def declare(operation: str, torch_function: Callable[..., Any], triton_home: str | None = None) -> None:
    """Add an operation. triton_home: the module in `kernels.fused` with a function of the operation's name, and one
    called ``supports_<operation>``."""
    _TABLE[operation] = {"torch": _Implementation(torch_function)}
    if triton_home is not None:
        _TRITON_HOMES[operation] = triton_home


def declare_native(operation: str, function: Callable[..., Any], supports: Supports | None = None) -> None:
    """Give a declared operation its compiled form, which runs where `native.why_not` finds nothing against it.

    supports: as for `register_kernel`."""
    _TABLE[operation]["native"] = _Implementation(function, supports)


def operations() -> list[str]:
    """Names of the operations."""
    return sorted(_TABLE)


def kernel_names(operation: str) -> list[str]:
    """Names of an operation's implementations. Raises KernelError if there is no such operation."""
    _check_operation(operation)
    return sorted({*_TABLE[operation], *(["triton"] if operation in _TRITON_HOMES else [])})


def register_kernel(
    operation: str,
    name: str,
    function: Callable[..., Any],
    *,
    supports: Supports | None = None,
    exist_ok: bool = False,
) -> None:
    """Add an implementation of an operation, to be chosen by name like a built-in one.

    operation: one of `operations`. function: takes what the operation takes, without ``kernels``, and returns the same.
    supports: called with the same arguments; a reason why the function cannot take them, or None.
    Raises KernelError for an unknown operation, RegistrationError if the name is a built-in one, or is taken and
    ``exist_ok`` is false.
    """
    _check_operation(operation)
    if name in BUILT_IN or (name in kernel_names(operation) and not exist_ok):
        raise RegistrationError(
            f"kernel {name!r} of {operation} is taken; choose another name, or pass exist_ok=True to replace a "
            "registered one (built-in ones stay)"
        )
    _TABLE[operation][name] = _Implementation(function, supports)


def _check_operation(operation: str) -> None:
    if operation not in _TABLE:
        raise KernelError(
            f"unknown operation {operation!r}{nearest(operation, _TABLE)} operations: {', '.join(operations())}"
        )


def _import_triton(operation: str) -> bool:
    """Put the Triton implementation of an operation into its table, if it is not there yet."""
    if operation not in _TRITON:
        module = import_module(f".fused.{_TRITON_HOMES[operation]}", __package__)
        supports = getattr(module, f"supports_{operation}")
        _TRITON[operation] = _Implementation(getattr(module, operation), supports)
    return True


# What torch.compiler.assume_constant_result does, without importing the compiler: it calls this instead of tracing it.
_import_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Kernels:
    """Which implementation of each operation runs.

    default: "auto", "torch", "triton", "native" or a registered name, for all operations; one that only some operations
        know counts for those, the others are chosen as "auto". choices: {operation: name}, which wins over ``default``.
    Raises KernelError for a name that no operation knows, or an operation that does not know its name.
    """

    default: str = "auto"
    choices: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", dict(self.choices))
        known = {*BUILT_IN, *(name for row in _TABLE.values() for name in row)}
        if not isinstance(self.default, str) or self.default not in known:
            hint = nearest(self.default, known) if isinstance(self.default, str) else ""
            raise KernelError(f"unknown kernels {self.default!r}{hint} available: {', '.join(sorted(known))}")
        for operation, name in self.choices.items():
            if name not in ("auto", *kernel_names(operation)):
                raise KernelError(
                    f"{operation} has no kernel {name!r}; available: auto, {', '.join(kernel_names(operation))}"
                )

    @staticmethod
    def of(value: Kernels | str | Mapping[str, str]) -> Kernels:
        """From what a caller gives: a name for all operations, {operation: name}, or a selection as it is."""
        if isinstance(value, Kernels):
            return value
        return Kernels(choices=value) if isinstance(value, Mapping) else Kernels(value)

    def __hash__(self) -> int:
        return hash((self.default, tuple(sorted(self.choices.items()))))

    def name_of(self, operation: str) -> str:
        """What was asked for an operation: "auto" or the name of an implementation."""
        name = self.choices.get(operation, self.default)
        known = name == "triton" and operation in _TRITON_HOMES
        return name if known or name in ("auto", "torch") or name in _TABLE[operation] else "auto"

    def require(self, device: torch.device | None = None) -> Kernels:
        """This selection, if it can run. Raises KernelError if Triton or compiled code was asked for and ``device``
        (None: any device of this machine) cannot run it."""
        asked = (self.default, *self.choices.values())
        if "triton" in asked:
            _must_run("triton", support.no_gpu_at_all() if device is None else support.why_not(device))
        if "native" in asked:
            _must_run("native", _why_not_native(torch.device("cpu") if device is None else device))
        return self

    def chosen(self, operation: str, device: torch.device | str) -> str:
        """Name of the implementation that runs for tensors on a device, if it supports their dtypes and shapes."""
        name = self.name_of(operation)
        if name != "auto":
            return name
        place = device if isinstance(device, torch.device) else torch.device(device)
        if operation in _TRITON_HOMES and support.prefers(place):
            return "triton"
        runs = "native" in _TABLE[operation] and _why_not_native(place) is None
        return "native" if runs else "torch"


def _why_not_native(device: torch.device) -> str | None:
    return native.why_not() if device.type == "cpu" else f"compiled code runs on the CPU, the tensors are on {device}"


def _must_run(name: str, reason: str | None, operation: str = "") -> None:
    if reason is not None:
        raise KernelError(
            f"kernels={name!r} was asked for and cannot run{' ' if operation else ''}{operation}: {reason}. Pass "
            "kernels='auto'"
        )


def _warn_if_native_would_run(compiled: _Implementation, tensor: Tensor, arguments: tuple[Any, ...]) -> None:
    if compiled.supports is None or compiled.supports(tensor, *arguments) is None:
        native.warn()


AUTO = Kernels()


def dispatch(kernels: Kernels, operation: str, tensor: Tensor, *arguments: Any) -> Any:
    """Call the operation with (tensor, *arguments), by the implementation that ``kernels`` and the tensor's device say.

    Raises KernelError if an implementation asked for by name cannot run there or does not take the arguments.
    """
    asked = kernels.name_of(operation)
    name = kernels.chosen(operation, tensor.device) if asked == "auto" else asked
    if name == "triton":
        _must_run(name, support.why_not(tensor.device), operation)
        _import_triton(operation)
    elif name == "native" and asked != "auto":
        _must_run(name, _why_not_native(tensor.device), operation)
    elif name == "torch" and asked == "auto" and tensor.device.type == "cpu" and "native" in _TABLE[operation]:
        _warn_if_native_would_run(_TABLE[operation]["native"], tensor, arguments)
    found = _TRITON[operation] if name == "triton" else _TABLE[operation][name]
    if found.supports is not None and (reason := found.supports(tensor, *arguments)) is not None:
        if asked != "auto":
            raise KernelError(f"kernel {name!r} of {operation} cannot take this: {reason}. Pass kernels='auto'")
        found = _TABLE[operation]["torch"]
    return found.function(tensor, *arguments)
